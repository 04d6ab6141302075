"""Layouts of the same run on so many devices: which fit, which are fastest, and which is nearest to one that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from eellm.layout import ParallelLayout
from eellm.metrics.flops import Recompute
from eellm.plan.case import Case
from eellm.plan.device import Device
from eellm.plan.iteration import iterate
from eellm.plan.times import Split
from eellm.schedule.program import ScheduleError

MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
"""In the order in which they are tried: what fits with less is not tried with more."""
ROUNDS = 4
"""Rounds of the pipeline that are simulated; every further one takes about as long as the last."""
MOST_DEVICES = 8192
MOST_STAGES = 64


@dataclass(frozen=True)
class Candidate:
    """A layout with its time of a step in seconds, and bytes on the fullest device."""

    case: Case
    time: float
    peak_bytes: float
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        return self.case.tokens / self.time

    def settings(self) -> dict[str, object]:
        """What sets it apart, as keys of the config."""
        layout, case = self.case.layout, self.case
        return {
            "parallel.tp": layout.tp,
            "parallel.pp": layout.pp,
            "parallel.vp": layout.vp,
            "parallel.sequence_parallel": layout.sequence_parallel,
            "parallel.layers_per_stage": case.split,
            "data.micro_batch_size": layout.micro_batch_size,
            "trainer.recompute": case.shape.recompute,
            "optimizer.distributed": case.distributed,
        }

    def changes(self, case: Case) -> dict[str, object]:
        """Settings that differ from a case's."""
        before = Candidate(case, 0.0, 0.0, False).settings()
        return {key: value for key, value in self.settings().items() if value != before[key]}


def estimate(case: Case) -> Candidate:
    """By 1F1B or interleaved 1F1B, whichever the chunks ask for; tuning goes forward only. Raises ScheduleError where there is
    none."""
    schedule = "forward_only" if case.tunes else "interleaved" if case.layout.vp > 1 else "one_f_one_b"
    unit, count = case.layout.pp, case.num_microbatches
    if count <= (ROUNDS + 1) * unit or count % unit:
        whole = iterate(case, schedule)
        return Candidate(case, whole.time, whole.peak_bytes, whole.fits)
    short, longer = (iterate(_with_microbatches(case, rounds * unit), schedule) for rounds in (ROUNDS, ROUNDS + 1))
    time = short.time + (longer.timeline.time - short.timeline.time) * (count / unit - ROUNDS)
    return Candidate(case, time, longer.peak_bytes, longer.fits)


def ranked(case: Case) -> list[Candidate]:
    """Layouts that fit on the case's devices, fastest first."""
    found = [candidate for layout in _layouts(case, case.device) if (candidate := _lightest(case, layout)) is not None]
    return sorted(found, key=lambda candidate: candidate.time)


def nearest(case: Case) -> Candidate | None:
    """The layout that fits with the fewest changes, on as many devices or, where none does, on the next power of two times as
    many; the fastest of several."""
    devices = case.layout.world_size
    while devices <= MOST_DEVICES:
        layout = replace(case.layout, dp=max(1, devices // (case.layout.tp * case.layout.pp)))
        candidates = ranked(replace(case, layout=layout))
        if candidates:
            return min(candidates, key=lambda candidate: (len(candidate.changes(case)), candidate.time))
        devices *= 2
    return None


def _layouts(case: Case, device: Device) -> Iterator[ParallelLayout]:
    devices, spec = case.layout.world_size, case.spec
    for tp in (size for size in (1, 2, 4, 8) if size <= device.per_node and devices % size == 0):
        if any(size % tp for size in (spec.num_heads, spec.num_query_groups, spec.ffn_hidden_size, spec.padded_vocab_size)):
            continue
        for pp in (size for size in range(1, min(MOST_STAGES, spec.num_layers) + 1) if devices // tp % size == 0):
            for vp in (1, 2) if 1 < pp <= spec.num_layers // 2 else (1,):
                for micro_batch in MICRO_BATCHES:
                    sequence_parallel = tp > 1 and case.shape.sequence % tp == 0
                    sizes = ParallelLayout(tp, pp, vp, devices // tp // pp, sequence_parallel, micro_batch)
                    yield replace(sizes, global_batch_size=case.layout.global_batch_size)


def _lightest(case: Case, layout: ParallelLayout) -> Candidate | None:
    """The layout with as little recomputation as fits, if any does."""
    split: Split = None if case.spec.num_layers % layout.num_stages == 0 else "balance"
    same = (layout.pp, layout.vp) == (case.layout.pp, case.layout.vp)
    for recompute in RECOMPUTE:
        other = case.with_layout(layout, case.split if same else split, recompute)
        other = replace(other, distributed=case.distributed or layout.dp > 1)
        try:
            if any(other.static(rank).total > other.device.usable_bytes for rank in range(layout.pp)):
                return None  # whatever is recomputed
            candidate = estimate(other)
        except ScheduleError:
            return None
        if candidate.fits:
            return candidate
    return None


def _with_microbatches(case: Case, count: int) -> Case:
    layout = case.layout
    batch = count * layout.micro_batch_size * layout.dp
    return replace(case, layout=replace(layout, global_batch_size=batch))


def device_counts(case: Case, wanted: int) -> list[int]:
    """The numbers of devices next to `wanted`, below and above, on which the case's layout makes whole replicas that divide the
    batch."""
    unit = case.layout.tp * case.layout.pp
    replicas = case.layout.global_batch_size // case.layout.micro_batch_size
    possible = [unit * dp for dp in range(1, replicas + 1) if replicas % dp == 0]
    below, above = ([count for count in possible if (count > wanted) == up] for up in (False, True))
    return [*below[-1:], *above[:1]]
