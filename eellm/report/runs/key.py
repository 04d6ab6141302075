"""The key of the figures of many runs: what each colour, dash and marker stands for, as HTML that breaks where it has to."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from eellm.drawing.palette import run_colour
from eellm.drawing.plot import DASHES, MARKERS
from eellm.report.runs.compared import Line
from eellm.report.runs.figures import LINE_WIDTH

SHAPES = {
    "o": '<circle cx="18" cy="6" r="3.4"/>',
    "s": '<path d="M15 3h6v6h-6z"/>',
    "D": '<path d="M18 1.8l4.2 4.2-4.2 4.2-4.2-4.2z"/>',
    "^": '<path d="M18 2l4 7h-8z"/>',
    "v": '<path d="M18 10l4-7h-8z"/>',
    "P": '<path d="M16.7 2h2.6v2.7H22v2.6h-2.7V10h-2.6V7.3H14V4.7h2.7z"/>',
    "X": '<path d="M14.5 2.5l7 7m0-7l-7 7" stroke-width="2.4"/>',
    "*": '<path d="M18 1.2l1.4 3.2 3.4.3-2.6 2.3.8 3.4-3-1.8-3 1.8.8-3.4-2.6-2.3 3.4-.3z"/>',
}
"""matplotlib's markers around the middle of the swatch."""


def key(lines: Sequence[Line]) -> str:
    entries = "".join(f"<span>{swatch(index)}{escape(own.label)}</span>" for index, own in enumerate(lines))
    return f'<div class="key">{entries}</div>'


def swatch(index: int) -> str:
    """A piece of the n-th line."""
    colour = run_colour(index, "var(--text)")
    dashes = DASHES[index % len(DASHES)]
    pattern = "" if dashes == "-" else f' stroke-dasharray="{" ".join(f"{LINE_WIDTH * length:g}" for length in dashes[1])}"'
    shape = SHAPES[MARKERS[index % len(MARKERS)]]
    line = f'<path d="M0 6h36" stroke-width="{LINE_WIDTH}"{pattern}/>'
    return f'<svg viewBox="0 0 36 12" aria-hidden="true" style="stroke:{colour};fill:{colour}">{line}{shape}</svg>'
