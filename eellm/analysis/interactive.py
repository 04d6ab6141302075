"""Speed against quality on one page that needs nothing but itself: point at a point and see which run and setting it is."""

from __future__ import annotations

import re
from html import escape

import pandas as pd

from eellm.analysis.comparison import pareto_front
from eellm.analysis.exits import SHARE
from eellm.analysis.plots import By, speed_quality_drawing
from eellm.analysis.runs import records
from eellm.drawing.document import document
from eellm.drawing.inline_svg import inline_svg
from eellm.drawing.number_text import MISSING, plural
from eellm.drawing.plot import Plot

STYLE = """
.chart { padding: 14px 18px; margin: 18px 0; }
.chart svg { display: block; width: 100%; height: auto; max-height: 78vh; overflow: visible; }
.point { cursor: pointer; outline: none; }
.point.lit use { stroke-width: 2.5; }
tr.lit td { background: var(--page); }
tbody tr { cursor: default; }
"""
SCRIPT = """
const tip = document.getElementById("tip");
const parts = n => document.querySelectorAll(`[data-row="${n}"]`);
function light(row, at) {
  document.querySelectorAll(".lit").forEach(part => part.classList.remove("lit"));
  tip.hidden = true;
  if (row === undefined) return;
  const found = [...parts(row)], point = found.find(part => part.matches(".point"));
  found.forEach(part => part.classList.add("lit"));
  if (!point || !at) return;
  tip.textContent = point.getAttribute("aria-label");
  tip.hidden = false;
  const box = point.getBoundingClientRect(), own = tip.getBoundingClientRect(), right = box.right + 12;
  const left = right + own.width < innerWidth ? right : box.left - own.width - 12;
  tip.style.left = Math.max(6, left) + "px";
  tip.style.top = Math.max(6, Math.min(box.top - own.height / 2, innerHeight - own.height - 6)) + "px";
}
for (const kind of ["pointerover", "focusin", "click"])
  document.addEventListener(kind, event => {
    const part = event.target.closest("[data-row]");
    light(part?.dataset.row, part?.closest(".chart"));
  });
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
"""


def speed_quality_page(frame: pd.DataFrame, by: By = "decoding", speed: str = "speedup", quality: str = "agreement") -> str:
    """The document, to be written to a file or shown in a notebook: `plot_speed_quality` of the same frame, whose points name
    their run, settings and values on hover, tap and focus, above a table of the rows; those on the Pareto front are marked.
    """
    known = frame.dropna(subset=[speed, quality]).reset_index(drop=True)
    plot = Plot("speed_quality", f"{speed} against {quality}", "", speed_quality_drawing(known, by, speed, quality))
    telling = {name for name in _shown(known) if name == "run" or known[name].nunique(dropna=False) > 1}
    cells = [{name: _cell(name, row[name]) for name in _shown(known)} for row in records(known)]

    def with_text(match: re.Match[str]) -> str:
        number = int(match.group(1))
        text = "\n".join(f"{name} {value}" for name, value in cells[number].items() if name in telling and value != MISSING)
        return f'<g class="point" tabindex="0" role="img" data-row="{number}" aria-label="{escape(text)}">'

    svg = re.sub(r'<g id="point-(\d+)">', with_text, inline_svg(plot, (), keep=r"point-\d+"))
    front = set(pareto_front(known, speed, quality).index)
    runs = plural(frame["run"].nunique(), "run")
    body = (
        f"<h1>Speed against quality</h1><p>{plural(len(known), 'row')} of {runs}. Filled points are on the Pareto front: no "
        "other row is as fast and as good, and better in one of the two. Where rows differ in the seed alone, these are the "
        f'luckiest: take means before the front is believed.</p><div class="card chart">{svg}</div>{_table(known, cells, front)}'
    )
    return document("Speed against quality", body, style=STYLE, script=SCRIPT)


def _shown(frame: pd.DataFrame) -> list[str]:
    """Columns that say something: not shares, not what no row has."""
    return [name for name in map(str, frame.columns) if not name.startswith(SHARE) and frame[name].notna().any()]


def _table(known: pd.DataFrame, cells: list[dict[str, str]], front: set[int]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in (*_shown(known), "Pareto front"))
    lines = []
    for number, row in enumerate(cells):
        texts = "".join(f"<td>{escape(row[name])}</td>" for name in _shown(known))
        lines.append(f'<tr data-row="{number}">{texts}<td>{"yes" if number in front else ""}</td></tr>')
    return f'<div class="scroll card"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(name: str, value: object) -> str:
    if name == "run":  # the end of a path is what tells runs apart
        return "/".join(str(value).split("/")[-2:])
    if value is None or value != value:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
