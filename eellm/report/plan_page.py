"""What task=plan found out, as one page that needs nothing else: tables and Gantt charts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from eellm.plan.outcome import Outcome
from eellm.report import plan_table
from eellm.report.gantt import Chart
from eellm.report.gantt_page import gantt_page
from eellm.schedule.simulate import simulate


def charts_of(outcome: Outcome) -> list[Chart]:
    """All schedules, the chosen one first, and that one without exits."""
    chosen = outcome.chosen
    charts = [Chart.of(chosen.timeline, chosen.schedule)]
    if outcome.case.spec.exits:
        bare = simulate(chosen.timeline.program, chosen.costs.without_exits())
        charts.append(Chart.of(bare, f"{chosen.schedule} without exits"))
    others = [iteration for iteration in outcome.iterations if iteration is not chosen]
    return [*charts, *(Chart.of(iteration.timeline, iteration.schedule) for iteration in others)]


def plan_page(outcome: Outcome, charts: list[Chart]) -> str:
    parts = [
        f"<p>{escape(outcome.words())}</p>",
        _table("Schedules", plan_table.SCHEDULES, plan_table.schedule_rows(outcome), reference=outcome.chosen.schedule),
        *(f'<p class="note">{escape(f"{schedule}: {reason}")}</p>' for schedule, reason in outcome.refused.items()),
        *(f'<p class="note">{escape(note)}</p>' for note in plan_table.NOTES),
        _table(
            f"Stages, {outcome.chosen.schedule}: a microbatch on one device, GiB",
            plan_table.STAGES,
            plan_table.stage_cells(outcome),
        ),
        _table("Memory of one device at its peak, GiB", plan_table.RANKS, plan_table.rank_cells(outcome)),
    ]
    if outcome.ranking:
        words = f"Layouts that fit on {outcome.devices} devices, fastest first"
        parts.append(_table(words, plan_table.RANKING, plan_table.ranking_cells(outcome)))
    return gantt_page("task=plan", plan_table.title(outcome), parts, charts)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], reference: str | None = None) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr{' class=reference' if row[0] == reference else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{escape(title)}</h2><div class="card scroll">{table}</div>'
