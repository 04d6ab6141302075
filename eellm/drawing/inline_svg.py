"""A matplotlib figure as SVG inside a page: no outside references, and colours that follow the page's theme.

The figure is drawn in stand-in colours, one per role, which are then replaced by CSS variables: the same drawing
serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape

from eellm.drawing.palette import Ink
from eellm.drawing.plot import Plot

ROLES = ("text", "muted", "grid", "background")


def head_variable(head: str) -> str:
    """CSS variable of a head's colour, e.g. `--exit-06`."""
    return "--" + head.replace("_", "-")


def theme_ink(heads: Sequence[str]) -> Ink:
    """Stand-in colours for all roles."""
    named = {head: _stand_in(index) for index, head in enumerate(heads)}
    roles = {role: _stand_in(0xF0 + index) for index, role in enumerate(ROLES)}
    return Ink(heads=named, **roles)


def inline_svg(plot: Plot, heads: Sequence[str], keep: str = "") -> str:
    """The plot as an <svg> element that scales to its container. `keep`: regular expression of the groups' ids that stay."""
    import matplotlib

    ink, buffer = theme_ink(heads), io.StringIO()
    # Texts stay texts: they take the page's font, can be selected and read aloud.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name, "font.family": "sans-serif"}):
        plot.figure(ink).savefig(buffer, format="svg", metadata={"Date": None})
    return _for_page(buffer.getvalue(), plot, ink, keep)


def _stand_in(number: int) -> str:
    return f"#fe{number:02x}01"


def _for_page(svg: str, plot: Plot, ink: Ink, keep: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    # Group ids repeat from figure to figure, and nothing refers to the others; those of clip paths and markers are hashes.
    svg = re.sub(rf'<g id="(?!(?:{keep})")[^"]*">', "<g>", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    assert viewbox is not None
    svg = re.sub(r"^<svg[^>]*>", f'<svg {viewbox.group()} role="img" aria-label="{escape(plot.title)}">', svg)
    for head, colour in ink.heads.items():
        svg = svg.replace(colour, f"var({head_variable(head)})")
    for role in ROLES:
        svg = svg.replace(getattr(ink, role), f"var(--{role})")
    return svg
