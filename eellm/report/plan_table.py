"""What task=plan found out, for the terminal: tables of at most 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from eellm.drawing.number_text import count, percent, time_text
from eellm.errors import as_typed
from eellm.plan import parameters
from eellm.plan.iteration import RUNS, Iteration, stage_rows
from eellm.plan.outcome import Outcome
from eellm.plan.search import Candidate

_GIB = 1024**3
SCHEDULES = ("schedule", "step", "bubble", "balance", "exits cost", "peak", "tokens/s/device", "fits", "runs")
STAGES = ("stage", "layers", "heads", "parameters", "forward", "backward", "a microbatch", "logits")
RANKS = ("rank", "weights", "gradients", "optimizer", "activations", "total", "")
RANKING = ("tp", "pp", "vp", "dp", "micro-batch", "recompute", "layers", "step", "peak", "tokens/s/device")
NOTES = (
    "step: with optimizer and data-parallel reduction; peak: GiB of the fullest device; runs: no = simulated only.",
    "exits cost: time against the same schedule without exits. Partial microbatches of bubble filling come out of the batch.",
)


def title(outcome: Outcome) -> str:
    layout = outcome.case.layout
    sizes = f"tp{layout.tp} pp{layout.pp} dp{layout.dp}" + (f" vp{layout.vp}" if layout.vp > 1 else "")
    return (
        f"{count(parameters.whole_model(outcome.case.spec))} parameters, {sizes}, {outcome.devices} x {outcome.case.device.name}"
    )


def schedule_rows(outcome: Outcome) -> list[list[str]]:
    return [_schedule_row(iteration, outcome.devices) for iteration in outcome.iterations]


def _schedule_row(iteration: Iteration, devices: int) -> list[str]:
    return [
        iteration.schedule,
        time_text(iteration.time),
        percent(iteration.timeline.bubble, 1),
        f"{iteration.balance:.3f}",
        f"{100 * iteration.exits_cost:+.2f}%",
        f"{iteration.peak_bytes / _GIB:.1f}",
        f"{iteration.tokens_per_second / devices:,.0f}",
        "yes" if iteration.fits else "no",
        "yes" if iteration.schedule in RUNS else "no",
    ]


def stage_cells(outcome: Outcome) -> list[list[str]]:
    return [
        [
            str(row.index),
            f"{row.layers[0]}-{row.layers[-1]}",
            ", ".join(name.removeprefix("exit_") for name in row.exits) or "\N{EN DASH}",
            count(row.parameters),
            time_text(row.forward),
            time_text(row.backward),
            f"{row.activations / _GIB:.2f}",
            f"{row.logits / _GIB:.2f}",
        ]
        for row in stage_rows(outcome.chosen)
    ]


def rank_cells(outcome: Outcome) -> list[list[str]]:
    usable = outcome.chosen.usable_bytes
    return [
        [
            str(index),
            *(f"{value / _GIB:.2f}" for value in (rank.weights, rank.gradients, rank.optimizer, rank.activations, rank.total)),
            "" if rank.total <= usable else "does not fit",
        ]
        for index, rank in enumerate(outcome.chosen.ranks)
    ]


def ranking_cells(outcome: Outcome) -> list[list[str]]:
    return [_ranking_row(candidate) for candidate in outcome.ranking]


def _ranking_row(candidate: Candidate) -> list[str]:
    layout, split = candidate.case.layout, candidate.case.split
    sizes = [str(size) for size in (layout.tp, layout.pp, layout.vp, layout.dp, layout.micro_batch_size)]
    layers = "equal" if split is None else as_typed(split)
    speed = f"{candidate.tokens_per_second / layout.world_size:,.0f}"
    return [
        *sizes,
        candidate.case.shape.recompute,
        layers,
        time_text(candidate.time),
        f"{candidate.peak_bytes / _GIB:.1f}",
        speed,
    ]


def print_plan(outcome: Outcome, console: Console) -> None:
    console.print(_table(title(outcome), SCHEDULES, schedule_rows(outcome)))
    for schedule, reason in outcome.refused.items():
        console.print(f"{schedule}: {reason}", style="dim")
    for note in NOTES:
        console.print(note, style="dim")
    console.print()
    console.print(_table(f"Stages, {outcome.chosen.schedule}: a microbatch on one device, GiB", STAGES, stage_cells(outcome)))
    console.print(_table("Memory of one device at its peak, GiB", RANKS, rank_cells(outcome)))
    if outcome.ranking:
        console.print(_table(f"Layouts that fit on {outcome.devices} devices, fastest first", RANKING, ranking_cells(outcome)))
    console.print(outcome.words(), style="bold", highlight=False)


def _table(title_: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title_, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
