"""The frame of every page: one HTML document that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from eellm.drawing.page_style import SCRIPT, STYLE, theme
from eellm.metrics.names import FINAL


def document(title: str, body: str, heads: Sequence[str] = (FINAL,), style: str = "", script: str = SCRIPT) -> str:
    """`body`: HTML inside <main>; `heads`: those that have a colour; `style`: beyond the style that all pages share."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{theme(heads)}\n{STYLE}{style}</style></head>\n"
        f'<body><main>{body}</main><div id="tip" role="tooltip" hidden></div><script>{script}</script></body></html>\n'
    )
