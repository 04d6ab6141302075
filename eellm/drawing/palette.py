"""Colours of heads: amber for the earliest exit to violet for the latest, and the text's own colour for the final head.

Hue and lightness both follow depth, so the order survives colour blindness and grey print. Colours are made in
OKLCH (a space in which equal steps look equal) for three backgrounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eellm.metrics.names import FINAL

Background = Literal["light", "dark", "terminal"]
LIGHTNESS = {"light": (0.72, 0.42), "dark": (0.86, 0.62), "terminal": (0.76, 0.58)}
"""Lightness of the earliest and the latest exit; a terminal may be light or dark, so it gets the middle."""
HUE = (75.0, -70.0)
CHROMA = 0.155
MODES = ("#0072b2", "#d55e00", "#009e73")
RUNS = (*MODES, "#cc79a7", "#b58900", "#56b4e9", "#7a5195")
"""Okabe and Ito's hues, without the yellow that is lost on white: dark enough for a light and light enough for a dark page."""


@dataclass(frozen=True)
class Ink:
    """What a figure is drawn with: one colour per head, and those of text, frames, grid and background."""

    heads: dict[str, str]
    text: str
    muted: str
    grid: str
    background: str


def exit_colours(count: int, background: Background) -> list[str]:
    """Hex colours of `count` exits in order of depth."""
    first, last = LIGHTNESS[background]
    colours = []
    for index in range(count):
        share = index / (count - 1) if count > 1 else 0.5
        colours.append(oklch(first + share * (last - first), CHROMA, HUE[0] + share * (HUE[1] - HUE[0])))
    return colours


def paper_ink(heads: Sequence[str]) -> Ink:
    """Colours for figures on white."""
    colours = exit_colours(sum(head != FINAL for head in heads), "light")
    named = dict(zip([head for head in heads if head != FINAL], colours, strict=True))
    return Ink(heads={**named, FINAL: "#1c1c1e"}, text="#1c1c1e", muted="#6e6e73", grid="#e3e3e1", background="#ffffff")


def mode_colour(index: int, ink: Ink) -> str:
    """Colour of the n-th mode of decoding in a figure: the text's own, then hues that differ for all kinds of sight
    (Okabe and Ito's blue, vermilion and green) and are legible on light and dark."""
    return [ink.text, *MODES][index % (1 + len(MODES))]


def run_colour(index: int, text: str) -> str:
    """Colour of the n-th run in a figure, the first one's is the text's; dashes and markers differ too."""
    return [text, *RUNS][index % (1 + len(RUNS))]


def pass_colours() -> dict[str, str]:
    """Fills of a Gantt chart's bars: light enough for dark text on either background, and of different lightness."""
    return {
        "forward": oklch(0.80, 0.09, 245),
        "forward_only": oklch(0.94, 0.03, 245),
        "backward": oklch(0.86, 0.10, 155),
        "weight": oklch(0.78, 0.10, 25),
        "exit": oklch(0.88, 0.15, 90),
        "final": oklch(0.74, 0.09, 310),
    }


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """sRGB hex of an OKLCH colour; chroma is lowered until the colour exists in sRGB."""
    while True:
        linear = _linear_rgb(lightness, chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue)))
        if all(-1e-4 <= channel <= 1.0001 for channel in linear) or chroma < 0.005:
            return "#" + "".join(f"{round(255 * _gamma(min(max(channel, 0.0), 1.0))):02x}" for channel in linear)
        chroma -= 0.005


def _linear_rgb(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    # Ottosson's published OKLab matrices: OKLab -> cone responses (cubed) -> linear sRGB.
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _gamma(channel: float) -> float:
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055
