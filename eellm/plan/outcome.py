"""What task=plan finds out, and its JSON form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from eellm.config.schema import Config
from eellm.errors import as_typed
from eellm.metrics.names import PLAN_BUBBLE, PLAN_EXITS_COST, PLAN_PEAK_GIB, PLAN_SECONDS
from eellm.plan import parameters
from eellm.plan.case import Case
from eellm.plan.iteration import RUNS, Iteration, chosen_schedule, iterate, stage_rows
from eellm.plan.search import Candidate, device_counts, nearest, ranked
from eellm.schedule.program import Program, ScheduleError


@dataclass(frozen=True)
class Outcome:
    """`iterations` are those of all schedules that exist for the case, `refused` says why others do not. `chosen` is the one
    that a run would use. `nearest` fits where `chosen` does not."""

    case: Case
    iterations: list[Iteration]
    refused: dict[str, str]
    chosen: Iteration
    nearest: Candidate | None = None
    ranking: list[Candidate] = field(default_factory=list)

    @property
    def devices(self) -> int:
        return self.case.layout.world_size

    def words(self) -> str:
        """Whether the layout fits, and what would."""
        peak, usable = self.chosen.peak_bytes / 1024**3, self.chosen.usable_bytes / 1024**3
        fullest = max(range(len(self.chosen.ranks)), key=lambda rank: self.chosen.ranks[rank].total)
        needs = f"rank {fullest} needs {peak:.1f} of {usable:.1f} GiB on {self.case.device.name}"
        if self.chosen.fits:
            return f"It fits: {needs}."
        if self.nearest is None:
            return f"It does not fit: {needs}, and no layout fits on any number of these devices that was tried."
        near = self.nearest
        changes = " ".join(f"{key}={as_typed(value)}" for key, value in near.changes(self.case).items())
        on = "" if near.case.layout.world_size == self.devices else f" on {near.case.layout.world_size} devices"
        return f"It does not fit: {needs}. The nearest that does{on}: {changes or 'the same layout'} ({near.time:.2f} s a step)."

    def json(self) -> dict[str, Any]:
        return {
            "device": asdict(self.case.device),
            "devices": self.devices,
            "layout": asdict(self.case.layout),
            "parameters": parameters.whole_model(self.case.spec),
            "fits": self.chosen.fits,
            "words": self.words(),
            "schedules": {iteration.schedule: _iteration_json(iteration) for iteration in self.iterations},
            "refused": self.refused,
            "stages": [asdict(row) for row in stage_rows(self.chosen)],
            "ranks": [asdict(rank) | {"total": rank.total} for rank in self.chosen.ranks],
            "ranking": [_candidate_json(candidate) for candidate in self.ranking],
            "nearest": None if self.nearest is None else _candidate_json(self.nearest),
        }

    def metrics(self) -> dict[str, float]:
        """Final scalars of the run."""
        named: dict[str, float] = {}
        for iteration in self.iterations:
            values = {PLAN_SECONDS: iteration.time, PLAN_BUBBLE: iteration.timeline.bubble, PLAN_EXITS_COST: iteration.exits_cost}
            named |= {key.format(schedule=iteration.schedule): value for key, value in values.items()}
        return named | {PLAN_PEAK_GIB: self.chosen.peak_bytes / 1024**3}


def _iteration_json(iteration: Iteration) -> dict[str, Any]:
    return {
        "seconds": iteration.time,
        "pipeline_seconds": iteration.timeline.time,
        "seconds_without_exits": iteration.bare,
        "exits_cost": iteration.exits_cost,
        "bubble": iteration.timeline.bubble,
        "balance": iteration.balance,
        "tokens_per_second": iteration.tokens_per_second,
        "peak_bytes": iteration.peak_bytes,
        "fits": iteration.fits,
        "runs": iteration.schedule in RUNS,
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return candidate.settings() | {
        "devices": candidate.case.layout.world_size,
        "seconds": candidate.time,
        "tokens_per_second": candidate.tokens_per_second,
        "peak_bytes": candidate.peak_bytes,
    }


def plan(config: Config, vocab_size: int, program: Program | None = None) -> Outcome:
    """`program` is that of schedule=csv. Raises ScheduleError where the layout makes no whole replicas or stages."""
    case = _on(Case.of(config, vocab_size), config.plan.gpus)
    iterations: list[Iteration] = []
    refused: dict[str, str] = {}
    trained = [*(["csv"] if program else []), *config.plan.schedules]
    for schedule in ["forward_only"] if case.tunes else trained:
        try:
            iterations.append(iterate(case, schedule, program if schedule == "csv" else None))
        except ScheduleError as error:
            refused[schedule] = str(error)
    if not iterations:
        raise ScheduleError("; ".join(f"{schedule}: {reason}" for schedule, reason in refused.items()))
    chosen = _chosen(config, iterations)
    return Outcome(
        case=case,
        iterations=iterations,
        refused=refused,
        chosen=chosen,
        nearest=None if chosen.fits else nearest(case),
        ranking=ranked(case)[: config.plan.rows] if config.plan.search else [],
    )


def _on(case: Case, devices: int | None) -> Case:
    """Raises ScheduleError, which names the numbers of devices that would do."""
    wanted = case.layout.world_size if devices is None else devices
    try:
        placed = case if devices is None else case.on(devices)
        assert placed.num_microbatches
        assert placed.stages
    except ScheduleError as error:
        counts = " or ".join(map(str, device_counts(case, wanted)))
        raise ScheduleError(f"{error}. plan.gpus next to {wanted} that this layout can use: {counts}") from None
    return placed


def _chosen(config: Config, iterations: list[Iteration]) -> Iteration:
    """What a run of this config would use, or else the first."""
    name = chosen_schedule(config)
    return next((iteration for iteration in iterations if iteration.schedule == name), iterations[0])
