"""A page of Gantt charts that needs nothing else, and under a run's own the simulated one."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from eellm.data.cache import write_atomically
from eellm.drawing.document import document
from eellm.report import gantt_svg
from eellm.report.gantt import Chart, save_png
from eellm.schedule.csv_file import parse_action
from eellm.schedule.measured import Recorded, measured_costs, measured_timeline
from eellm.schedule.program import Program
from eellm.schedule.simulate import simulate


def gantt_page(task: str, heading: str, parts: list[str], charts: list[Chart]) -> str:
    """HTML: a heading, `parts` (HTML too), the charts."""
    drawn = ["<h2>Timelines</h2>", gantt_svg.patterns(), gantt_svg.legend(charts), gantt_svg.figures(charts)]
    header = f'<header><p class="kicker">{escape(task)}</p><h1>{escape(heading)}</h1></header>'
    return document(heading, "".join([header, *parts, *drawn]), style=gantt_svg.STYLE, script=gantt_svg.SCRIPT)


def draw_recorded(record: Path, name: str) -> tuple[Path, Path]:
    """Draw what `eellm.train.timeline` has written, .html and .png beside it, above what the simulator makes of its medians."""
    found = json.loads(record.read_text(encoding="utf-8"))
    ranks = [
        [Recorded(parse_action(cell), begin, end, tuple(map(tuple, parts))) for cell, begin, end, parts in events]
        for events in found["ranks"]
    ]
    actions = tuple(tuple(event.action for event in events) for events in ranks)
    chunks = 1 + max(action.chunk for events in actions for action in events)
    program = Program(name, found["microbatches"], chunks, actions)
    measured = measured_timeline(program, ranks)
    simulated = simulate(program, measured_costs(measured))
    charts = [Chart.of(measured, f"{name}, the last step as it was"), Chart.of(simulated, "simulated from its medians")]
    share = simulated.time / measured.time
    words = f"The simulation takes {share:.1%} of the measured time: messages cost nothing there, and each stage always the same."
    page = gantt_page("task=train", f"{name} on {len(ranks)} stages", [f'<p class="note">{escape(words)}</p>'], charts)
    html, png = record.with_suffix(".html"), record.with_suffix(".png")
    write_atomically(html, page)
    save_png(charts, png)
    return html, png
