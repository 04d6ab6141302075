"""Gantt charts on a page: SVG inside HTML, with hatching, and a tip for every bar."""

from __future__ import annotations

import itertools
import math
from html import escape

from eellm.drawing.palette import pass_colours
from eellm.report.gantt import KINDS, Bar, Chart, shared_width
from eellm.schedule.costs import LAYERS, WEIGHTS

ROW, BAR, STRIP = 46, 26, 12
"""Heights, in pixels: of a rank's row, its bars, and its curve of memory."""
SHORTEST, WIDTH, WIDEST = 13.0, 950.0, 6000.0
"""Pixels: of the shortest pass through layers at least, of the drawing at least and at most."""

PATTERNS = {
    "forward": "",
    "forward_only": '<path d="M0 3h8" stroke="#0006"/>',
    "backward": '<path d="M-2 2l4-4M0 8l8-8M6 10l4-4" stroke="#0005"/>',
    "weight": '<path d="M-2 6l4 4M0 0l8 8M6-2l4 4" stroke="#0005"/>',
    "exit": '<circle cx="2" cy="2" r="1" fill="#0007"/><circle cx="6" cy="6" r="1" fill="#0007"/>',
    "final": '<path d="M0 8l8-8M0 0l8 8" stroke="#0005"/>',
}

STYLE = """
.gantt { padding: 14px clamp(10px, 2vw, 18px) 12px; margin: 14px 0; }
.gantt .rows { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 0 10px; }
.gantt .names { font-size: 0.78rem; color: var(--muted); white-space: nowrap; font-variant-numeric: tabular-nums; }
.gantt .names div { height: 46px; line-height: 26px; }
.gantt .lane { overflow-x: auto; }
.gantt svg { display: block; width: auto; max-width: none; }
.gantt rect { stroke: #0006; stroke-width: 0.5; }
.gantt rect:hover { stroke: var(--text); stroke-width: 2; }
.gantt text { font: 10px system-ui, sans-serif; text-anchor: middle; pointer-events: none; fill: #111; paint-order: stroke;
  stroke-width: 3px; stroke-linejoin: round; }
.gantt .axis text { fill: var(--muted); stroke: none; }
.gantt .axis path { stroke: var(--grid); }
.gantt .memory { fill: color-mix(in srgb, var(--accent) 22%, transparent); stroke: var(--accent); stroke-width: 1; }
.swatches { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 0.83rem; color: var(--muted); margin: 10px 0 0; }
.swatches svg { width: 22px; height: 14px; margin-right: 6px; vertical-align: -2px; display: inline-block; }
"""

SCRIPT = """
const tip = document.getElementById("tip");
for (const kind of ["pointerover", "click"])
  document.addEventListener(kind, event => {
    const bar = event.target.closest("rect[data-tip]");
    tip.hidden = !bar;
    if (!bar) return;
    tip.textContent = bar.dataset.tip;
    const box = bar.getBoundingClientRect(), own = tip.getBoundingClientRect(), above = box.top - own.height - 6;
    tip.style.left = Math.max(6, Math.min(box.left, innerWidth - own.width - 6)) + "px";
    tip.style.top = (above > 6 ? above : box.bottom + 6) + "px";
  });
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });
"""


def patterns() -> str:
    """The fills of all kinds, once for a page."""
    fills = "".join(
        f'<pattern id="fill-{kind}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<path d="M0 0h8v8H0z" fill="{colour}"/>{PATTERNS[kind]}</pattern>'
        for kind, colour in pass_colours().items()
    )
    return f'<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>{fills}</defs></svg>'


def legend(charts: list[Chart]) -> str:
    there = {kind for chart in charts for kind in chart.kinds}
    items = [
        f'<span><svg><rect x="0.5" y="0.5" width="21" height="13" fill="url(#fill-{kind})" stroke="#0006"/></svg>{words}</span>'
        for kind, words in KINDS.items()
        if kind in there
    ]
    if any(max(chart.timeline.peak_bytes) for chart in charts):
        items.append("<span>line below: activations, as a share of the highest of all ranks</span>")
    return f'<div class="swatches">{"".join(items)}</div>'


def figures(charts: list[Chart]) -> str:
    """Charts as cards, one below the other."""
    widest = shared_width(charts)
    scale = None if widest is None else max(_scale(chart, widest) for chart in charts)
    return "".join(figure(chart, scale) for chart in charts)


def _scale(chart: Chart, width: float) -> float:
    """Pixels for a unit of time, where a drawing spans `width` of these."""
    shortest = min(bar.width for bar in chart.bars if bar.name in (LAYERS, WEIGHTS))
    return min(WIDEST, max(WIDTH, SHORTEST * width / shortest)) / width


def figure(chart: Chart, scale: float | None = None) -> str:
    """One chart as a card. Names of ranks stand still where the drawing is wider than the page."""
    program = chart.timeline.program
    scale = scale or _scale(chart, chart.width)
    width, height = scale * chart.width, ROW * program.pp
    parts = [_memory(chart, rank, scale) for rank in range(program.pp)]
    parts += [_bar(chart, bar, scale) for bar in chart.bars]
    parts.append(_axis(chart, scale, height))
    label = escape(f"{chart.title}: {chart.summary}")
    svg = (
        f'<svg width="{width:.0f}" height="{height + 18}" viewBox="0 0 {width:.0f} {height + 18}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>'
    )
    names = "".join(f"<div>rank {rank}</div>" for rank in range(program.pp))
    return (
        f'<figure class="card gantt"><h3>{escape(chart.title)}</h3><p class="note">{escape(chart.summary)}</p>'
        f'<div class="rows"><div class="names">{names}</div><div class="lane" tabindex="0">{svg}</div></div></figure>'
    )


def _bar(chart: Chart, bar: Bar, scale: float) -> str:
    left, top, width = bar.left * scale, bar.box.rank * ROW, bar.width * scale
    rect = (
        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="url(#fill-{bar.kind})" '
        f'data-tip="{escape(chart.tip(bar))}"/>'
    )
    label = str(bar.box.action.microbatch)
    if bar.name not in (LAYERS, WEIGHTS) or width < 7 * len(label) + 3:
        return rect
    halo = pass_colours()[bar.kind]
    return f'{rect}<text x="{left + width / 2:.1f}" y="{top + BAR / 2 + 3.5}" style="stroke:{halo}">{label}</text>'


def _memory(chart: Chart, rank: int, scale: float) -> str:
    """A rank's activations over time, as steps below its bars."""
    peak = max(chart.timeline.peak_bytes)
    if not peak:
        return ""
    base, kept, points = rank * ROW + BAR + 3 + STRIP, 0.0, []
    for box in chart.timeline.ranks[rank]:
        steps = ((box.start, kept), (box.start, box.memory), (box.end, box.memory), (box.end, box.kept_bytes))
        places = [(time if chart.cut is None else chart.cut.place(time), value) for time, value in steps]
        points += [(place * scale, base - STRIP * value / peak) for place, value in places if place is not None]
        kept = box.kept_bytes
    if not points:
        return ""
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="memory" d="M{points[0][0]:.1f} {base}L{line}L{points[-1][0]:.1f} {base}"/>'


def _axis(chart: Chart, scale: float, height: float) -> str:
    step = _round_step(90 / scale)
    marks = []
    for index in itertools.count():
        at = index * step
        if at * scale > chart.width * scale - 20:
            break
        time = at
        if chart.cut is not None and at > chart.cut.begin:
            if at < chart.cut.begin + chart.cut.gap:
                continue
            time = at + chart.cut.end - chart.cut.begin - chart.cut.gap
        anchor = ' style="text-anchor:start"' if index == 0 else ""
        marks.append(f'<text x="{at * scale:.1f}" y="{height + 12}"{anchor}>{chart.time(time)}</text>')
    if chart.cut is not None:
        middle = (chart.cut.begin + chart.cut.gap / 2) * scale
        marks += [
            f'<text x="{middle:.1f}" y="{rank * ROW + BAR / 2 + 4}">\N{MIDLINE HORIZONTAL ELLIPSIS}</text>'
            for rank in range(chart.timeline.program.pp)
        ]
    return f'<g class="axis">{"".join(marks)}</g>'


def _round_step(least: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
