"""The simulator against a plain longest path, known numbers of the field, and EE-LLM's claims about exits."""

from __future__ import annotations

import functools
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.schedule.bubble_filling import bubble_filling, fill
from eellm.schedule.costs import Costs, HeadCosts, StageCosts
from eellm.schedule.program import FORWARDS, Action, Kind, Program, ScheduleError
from eellm.schedule.programs import forward_only, gpipe, interleaved, one_f_one_b, zero_bubble_h1
from eellm.schedule.simulate import Timeline, simulate


def uniform(stages: int, forward: float = 1, backward: float = 2, weight: float = 1) -> Costs:
    return Costs([StageCosts(forward, backward, weight)] * stages)


def with_exits(*stages: int, deferred: bool = True) -> Costs:
    """EE-LLM's Figure 3: four stages, backbone : head = 2 : 1, forward : backward = 1 : 2, a final head on the last."""
    final = HeadCosts("final", 1, 2, is_exit=False)
    heads = [[HeadCosts(f"exit_{stage}", 1, 2)] if stage in stages else [] for stage in range(4)]
    heads[3].append(final)
    return Costs([StageCosts(2, 4, 2, tuple(own)) for own in heads], deferred)


def programs(pp: int, groups: int) -> list[Program]:
    microbatches = pp * groups
    found = [plain(pp, microbatches) for plain in (gpipe, one_f_one_b, zero_bubble_h1, forward_only)]
    if pp > 1:
        found += [interleaved(pp, microbatches, 2), interleaved(pp, microbatches, 3)]
    if microbatches > 12:
        found.append(bubble_filling(fill(pp, microbatches, range(pp))))
    return found


def longest_path(program: Program, costs: Costs) -> float:
    """End of the last action, by its definition: each begins when its rank and its input are there. No bandwidth."""
    rank_of = {}
    for rank, actions in enumerate(program.computation.ranks):
        for index, action in enumerate(actions):
            rank_of[program.stage(rank, action.chunk), action.microbatch, action.kind] = (rank, index)

    def length(stage: int, action: Action) -> float:
        cost, split = costs.stages[stage], Kind.WEIGHT in program.passes[stage, action.microbatch]
        if action.kind is Kind.WEIGHT:
            return cost.weight
        exits, final = ([head for head in cost.heads if head.is_exit == is_exit] for is_exit in (True, False))
        eager = final if costs.deferred else cost.heads
        if action.kind is Kind.FORWARD:
            return cost.forward + sum(head.forward for head in eager)
        if action.kind is Kind.FORWARD_ONLY:
            heads = cost.heads if program.name == "forward_only" else ()
            return cost.forward + sum(head.forward for head in heads)
        late = sum(head.forward for head in exits) if costs.deferred else 0
        return cost.backward - split * cost.weight + late + sum(head.backward for head in cost.heads)

    @functools.cache
    def end(rank: int, index: int) -> float:
        action = program.computation.ranks[rank][index]
        stage = program.stage(rank, action.chunk)
        before = [end(rank, index - 1)] if index else [0.0]
        if action.kind in FORWARDS and stage:
            kinds = [kind for kind in FORWARDS if (stage - 1, action.microbatch, kind) in rank_of]
            source = rank_of[stage - 1, action.microbatch, kinds[0]]
            before.append(end(*source) + costs.latency * (source[0] != rank))
        if action.kind is Kind.BACKWARD and (stage + 1, action.microbatch, Kind.BACKWARD) in rank_of:
            source = rank_of[stage + 1, action.microbatch, Kind.BACKWARD]
            before.append(end(*source) + costs.latency * (source[0] != rank))
        return max(before) + length(stage, action)

    for rank, actions in enumerate(program.computation.ranks):
        for index in range(len(actions)):  # in order, so that recursion stays shallow
            end(rank, index)
    return max(end(rank, len(actions) - 1) for rank, actions in enumerate(program.computation.ranks) if actions)


TIMES = st.floats(0.1, 5.0)
HEADS = st.lists(st.builds(HeadCosts, st.just("exit"), TIMES, TIMES), max_size=2)
STAGES = st.builds(lambda f, b, share, heads: StageCosts(f, b, b * share, tuple(heads)), TIMES, TIMES, st.floats(0, 1), HEADS)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5), st.integers(1, 4), st.lists(STAGES, min_size=15, max_size=15), st.booleans(), st.sampled_from([0.0, 0.7])
)
def test_time_is_the_longest_path(pp: int, groups: int, stages: list[StageCosts], deferred: bool, latency: float) -> None:
    for program in programs(pp, groups):
        costs = Costs(stages[: program.num_stages], deferred, latency)
        timeline = simulate(program, costs)
        assert timeline.time == pytest.approx(longest_path(program, costs))
        path = timeline.critical_path()
        assert path[0].start == 0
        assert path[-1].end == timeline.time
        gaps = [later.start - earlier.end for earlier, later in pairwise(path)]
        allowed = [0.0, latency]
        assert all(min(abs(gap - value) for value in allowed) < 1e-6 for gap in gaps)


@pytest.mark.parametrize(
    ("pp", "microbatches", "plain", "zero_bubble"),
    [(4, 4, 0.429, 0.200), (4, 16, 0.158, 0.059), (8, 8, 0.467, 0.226), (8, 32, 0.179, 0.068)],
)
def test_the_table_of_bubbles(pp: int, microbatches: int, plain: float, zero_bubble: float) -> None:
    """F = 1, B = 2 of which W = 1: the shares of 1F1B and ZB1P, and the times of the formulas that stand beside them."""
    ordinary, split = (simulate(program(pp, microbatches), uniform(pp)) for program in (one_f_one_b, zero_bubble_h1))
    assert (round(ordinary.bubble, 3), round(split.bubble, 3)) == (plain, zero_bubble)
    work = 3 * microbatches
    assert ordinary.time - work == (pp - 1) * (1 + 2)
    assert split.time - work == (pp - 1) * (1 + 2 - 2 * 1)


@pytest.mark.parametrize(("pp", "microbatches", "chunks"), [(4, 8, 2), (4, 16, 4), (8, 16, 2)])
def test_interleaving_divides_the_bubble(pp: int, microbatches: int, chunks: int) -> None:
    """arXiv 2104.04473: bubble over work is (p - 1) / (v m)."""
    cut = simulate(interleaved(pp, microbatches, chunks), uniform(pp * chunks, 1 / chunks, 2 / chunks))
    assert cut.time - 3 * microbatches == pytest.approx((pp - 1) * 3 / chunks)
    assert simulate(gpipe(pp, microbatches), uniform(pp)).time - 3 * microbatches == (pp - 1) * 3


def starts(timeline: Timeline) -> list[str]:
    return [" ".join(f"{box.action}@{box.start:g}" for box in boxes) for boxes in timeline.ranks]


def test_bubble_filling_costs_nothing() -> None:
    """P = 4, r = 2: 6 ordinary microbatches with 2 of either part take as long as 6 alone. Part-1 microbatches are 8 and 9."""
    filled = simulate(bubble_filling(fill(4, 10, range(4))), uniform(4))
    assert filled.time == simulate(one_f_one_b(4, 6), uniform(4)).time == 27
    assert simulate(one_f_one_b(4, 8), uniform(4)).time == 33
    assert starts(filled) == [
        "F0@0 F1@1 F2@2 F3@3 F8@4 F9@5 B9@6 B8@8 B0@10 F4@12 B1@13 F5@15 B2@16 N6@18 B3@19 N7@21 B4@22 B5@25",
        "F0@1 F1@2 F2@3 F8@5 B8@6 B0@8 F3@10 B1@11 F4@13 B2@14 F5@16 B3@17 N6@19 B4@20 N7@22 B5@23",
        "F0@2 F1@3 B0@6 F2@8 B1@9 F3@11 B2@12 F4@14 B3@15 F5@17 B4@18 F6@20 B5@21 N7@23 B6@24",
        "F0@3 B0@4 F1@6 B1@7 F2@9 B2@10 F3@12 B3@13 F4@15 B4@16 F5@18 B5@19 F6@21 B6@22 F7@24 B7@25",
    ]


@pytest.mark.parametrize("deferred", [True, False])
def test_the_setting_of_figure_3(deferred: bool) -> None:
    """Six microbatches: 72 units without exits. An exit on a middle stage is passed once on the way in and once on the way out;
    one on the last stage is paid for every microbatch."""
    program = one_f_one_b(4, 6)
    assert simulate(program, with_exits()).time == 6 * (6 + 3) + 3 * 6 == 72
    assert simulate(program, with_exits(1, 2, deferred=deferred)).time == 72 + 2 * 3
    assert simulate(program, with_exits(3, deferred=deferred)).time == 72 + 6 * 3


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("exits", [(0,), (1,), (1, 2), (0, 1, 2)])
def test_exits_on_middle_stages_cost_nothing_per_microbatch(exits: tuple[int, ...], deferred: bool) -> None:
    """Claim 3.1 of EE-LLM: while such a stage is no slower than the last, exits add one forward and backward each to an
    iteration, whatever the number of microbatches. Half as heavy again, and every microbatch pays."""
    extra = []
    for microbatches in (4, 6, 12, 48):
        program = one_f_one_b(4, microbatches)
        extra.append(simulate(program, with_exits(*exits, deferred=deferred)).time - simulate(program, with_exits()).time)
    assert extra == [3 * len(exits)] * 4
    heavy = [
        StageCosts(2, 4, 2, (HeadCosts("exit_1", 1.5, 3),)) if stage == 1 else cost
        for stage, cost in enumerate(with_exits().stages)
    ]
    times = [simulate(one_f_one_b(4, microbatches), Costs(heavy, deferred)).time for microbatches in (12, 48)]
    assert times[1] - times[0] == 36 * (9 + 1.5)


def test_deferral_keeps_logits_of_one_microbatch() -> None:
    """By rank: P - s microbatches of activations; what exits keep for their backward pass is there as often if they are
    eager, once if they are deferred. Logits pass."""
    head = HeadCosts("exit", 1, 2, logits_bytes=100, kept_bytes=100)
    stages = [StageCosts(2, 4, heads=(head,), kept_bytes=10)] * 4
    deferred, eager = (simulate(one_f_one_b(4, 8), Costs(stages, deferred=deferred)) for deferred in (True, False))
    assert deferred.peak_bytes == [(4 - rank) * 10 + 200 for rank in range(4)]
    assert eager.peak_bytes == [(4 - rank) * 110 + 100 for rank in range(4)]
    assert simulate(forward_only(4, 8), Costs(stages)).peak_bytes == [100] * 4
    assert simulate(gpipe(4, 8), Costs(stages)).peak_bytes == [8 * 10 + 200] * 4
    assert simulate(zero_bubble_h1(4, 8), Costs([StageCosts(1, 2, 1, kept_bytes=10)] * 4)).peak_bytes == [40] * 4


def test_messages_take_time_and_follow_each_other() -> None:
    """Two ranks, one forward each: 1 + (8 bytes at 4 a second + 0.5) + 1. Two messages of a fast sender queue up."""
    costs = Costs([StageCosts(1, 2, output_bytes=8)] * 2, latency=0.5, bandwidth=4)
    assert simulate(forward_only(2, 1), costs).time == 1 + 2 + 0.5 + 1
    assert simulate(forward_only(2, 2), costs).time == 1 + 2 + 2 + 0.5 + 1
    assert simulate(one_f_one_b(2, 1), costs).time == 3.5 + 3 + 2.5 + 2


def test_what_stands_still_is_named() -> None:
    waits = Program("waits", 1, 1, ((Action(Kind.BACKWARD, 0),), (Action(Kind.FORWARD, 0), Action(Kind.BACKWARD, 0))))
    with pytest.raises(ScheduleError, match="standstill: rank 0 at B0, rank 1 at F0"):
        simulate(waits, uniform(2))
    with pytest.raises(ScheduleError, match="3 stages have costs, the program has 2"):
        simulate(waits, uniform(3))


def test_a_large_program_takes_milliseconds() -> None:
    """P = 16, M = 256: about 10 ms on an idle core; ten times that allows for a busy machine."""
    program, costs = one_f_one_b(16, 256), uniform(16)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        simulate(program, costs)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.1
