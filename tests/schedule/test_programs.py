"""Every program keeps the invariants for any size and exit layout; megatron-core's own functions are the oracle of its orders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.schedule.bubble_filling import bubble_filling, fill, most_fillers
from eellm.schedule.csv_file import read_csv, write_csv
from eellm.schedule.invariants import first_violation, most_in_flight
from eellm.schedule.program import Action, Kind, Program, ScheduleError, with_communication
from eellm.schedule.programs import forward_only, gpipe, interleaved, interleaved_order, one_f_one_b, zero_bubble_h1
from eellm.schedule.weights import Filled

RANKS, MICROBATCHES, CHUNKS = st.integers(1, 8), st.integers(1, 32), st.integers(2, 4)


@settings(deadline=None, max_examples=60)
@given(pp=RANKS, microbatches=MICROBATCHES)
def test_plain_programs(pp: int, microbatches: int) -> None:
    bounds = {
        gpipe: [microbatches] * pp,
        one_f_one_b: [min(microbatches, pp - rank) for rank in range(pp)],
        zero_bubble_h1: [min(microbatches, pp)] * pp,
        forward_only: [0] * pp,
    }
    for program_of, bound in bounds.items():
        program = program_of(pp, microbatches)
        assert first_violation(program, exit_stages=()) is None
        assert most_in_flight(program) == bound


@settings(deadline=None, max_examples=60)
@given(pp=st.integers(2, 8), groups=st.integers(1, 4), chunks=CHUNKS)
def test_interleaved(pp: int, groups: int, chunks: int) -> None:
    program = interleaved(pp, pp * groups, chunks)
    assert first_violation(program, exit_stages=()) is None
    total = pp * groups * chunks
    assert most_in_flight(program) == [min(total, 2 * (pp - rank - 1) + (chunks - 1) * pp + 1) for rank in range(pp)]


def test_in_flight_through_some_stages() -> None:
    assert most_in_flight(one_f_one_b(4, 8), {0, 2}) == [4, 0, 2, 0]
    assert most_in_flight(one_f_one_b(4, 2), {0}) == [2, 0, 0, 0], "no more than there are"
    # both chunks of rank 0: two microbatches through the first, two through the second, one more before the first backward
    assert most_in_flight(interleaved(2, 4, 2)) == [5, 3]
    assert most_in_flight(interleaved(2, 4, 2), {0}) == [4, 0], "a fourth is in before the first comes back to this chunk"
    assert most_in_flight(interleaved(2, 4, 2), {2}) == [2, 0]


@settings(deadline=None, max_examples=60)
@given(pp=st.integers(1, 8), microbatches=MICROBATCHES, chunks=CHUNKS)
def test_forward_only_in_chunks(pp: int, microbatches: int, chunks: int) -> None:
    assert first_violation(forward_only(pp, microbatches, chunks), exit_stages=()) is None


@settings(deadline=None, max_examples=200)
@given(
    pp=RANKS,
    microbatches=st.integers(1, 32),
    exits=st.sets(st.integers(0, 7)),
    ratio=st.floats(0.5, 4.0),
    counts=st.tuples(st.none() | st.integers(0, 6), st.none() | st.integers(0, 6)),
)
def test_bubble_filling(pp: int, microbatches: int, exits: set[int], ratio: float, counts: tuple[int | None, int | None]) -> None:
    exits = {stage for stage in exits if stage < pp}
    most = most_fillers(pp, ratio)
    wanted = sum(most if count is None else min(count, most) for count in counts)
    if wanted >= microbatches:
        with pytest.raises(ScheduleError, match="leave none of"):
            fill(pp, microbatches, exits, ratio, *counts)
        return
    filling = fill(pp, microbatches, exits, ratio, *counts)
    program = bubble_filling(filling)
    assert first_violation(program, exit_stages=exits) is None
    assert all(peak <= pp - rank + filling.part_one_on(rank) for rank, peak in enumerate(most_in_flight(program)))
    for stage in range(pp):
        assert all(program.runs_backward(stage, index) for index in range(filling.ordinary))
        assert sum(program.runs_backward(stage, index) for index in filling.part_one) == filling.part_one_on(stage)
    assert filling.ordinary + len(filling.begins) + len(filling.part_one) == microbatches


def test_the_counts_of_ee_llm() -> None:
    """landscape: K, and for P = 4 and 8 at r = 2 who fills how much."""
    assert [most_fillers(pp, 2.0) for pp in (2, 3, 4, 6, 8, 16)] == [0, 1, 2, 3, 4, 10]
    assert (most_fillers(4, 1.0), most_fillers(8, 1.0), most_fillers(8, 3.0)) == (1, 3, 5)
    four, eight = fill(4, 10, range(4)), fill(8, 20, range(8))
    assert [four.part_one_on(stage) for stage in range(4)] == [2, 1, 0, 0]
    assert [four.part_two_on(stage) for stage in range(4)] == [0, 0, 1, 2]
    assert [eight.part_one_on(stage) for stage in range(8)] == [4, 3, 2, 1, 0, 0, 0, 0]
    assert [eight.part_two_on(stage) for stage in range(8)] == [0, 0, 1, 2, 2, 3, 4, 4]


@settings(deadline=None, max_examples=100)
@given(
    pp=st.integers(2, 8),
    exits=st.sets(st.integers(0, 7)),
    ratio=st.floats(0.5, 4.0),
    tokens=st.lists(st.integers(1, 4096), min_size=14, max_size=32),
)
def test_bubble_filling_is_unbiased(pp: int, exits: set[int], ratio: float, tokens: list[int]) -> None:
    """For every loss and every stage up to it, the weights of the tokens of all contributing microbatches sum to 1: followed
    through the program, from where a loss is injected down the gradients that are sent."""
    exits = {stage for stage in exits if stage < pp}
    microbatches = len(tokens)
    filling = fill(pp, microbatches, exits, ratio)
    program, weights = bubble_filling(filling), Filled(filling, tokens)
    for source, is_final in [(stage, False) for stage in exits] + [(pp - 1, True)]:
        sums = [0.0] * (source + 1)
        for index in range(microbatches):
            if not program.runs_backward(source, index):
                continue
            weight = (weights.final() if is_final else weights.exit(source, index)) * tokens[index] / sum(tokens)
            for stage in reversed(range(source + 1)):
                if stage < source:
                    weight *= weights.received(stage, index)
                if not program.runs_backward(stage, index):
                    break
                sums[stage] += weight
        assert sums == pytest.approx([1.0] * (source + 1), rel=1e-12)


@pytest.mark.parametrize(("pp", "groups", "chunks"), [(2, 1, 2), (2, 3, 2), (4, 2, 2), (4, 1, 3), (8, 4, 4), (3, 2, 4)])
def test_interleaving_is_megatrons(pp: int, groups: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    table = schedules.get_schedule_table(pp * groups, chunks, pp)
    assert interleaved_order(pp, pp * groups, chunks) == table
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: pp)
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: chunks)
    for rank, actions in enumerate(interleaved(pp, pp * groups, chunks).ranks):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda rank=rank: rank)
        total, _, warmup, steady = schedules.get_pp_rank_microbatches(pp * groups, chunks, pp)
        expected = [("F", *table[index]) for index in range(warmup)]
        for index in range(steady):
            expected += [("F", *table[warmup + index]), ("B", table[index][0], chunks - 1 - table[index][1])]
        expected += [("B", microbatch, chunks - 1 - chunk) for microbatch, chunk in table[steady:total]]
        assert list(actions) == expected


@pytest.mark.parametrize("pp", [1, 2, 4, 8])
def test_plain_1f1b_is_megatrons(pp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: pp)
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: None)
    for rank, actions in enumerate(one_f_one_b(pp, 12).ranks):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda rank=rank: rank)
        warmup = schedules.get_pp_rank_microbatches(12, 1, None)[2] if pp > 1 else 0
        kinds = [action.kind.value for action in actions]
        assert kinds == ["F"] * warmup + ["F", "B"] * (12 - warmup) + ["B"] * warmup


def broken(program: Program, rank: int, change) -> Program:
    actions = list(program.ranks[rank])
    change(actions)
    return replace(program, ranks=(*program.ranks[:rank], tuple(actions), *program.ranks[rank + 1 :]))


PLAIN = one_f_one_b(2, 3)
WITH = with_communication(PLAIN)


def swap(actions: list[Action], first: str, second: str) -> None:
    names = [str(action) for action in actions]
    a, b = names.index(first), names.index(second)
    actions[a], actions[b] = actions[b], actions[a]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (broken(PLAIN, 0, lambda actions: actions.pop()), "rank 0: F2 has no B2"),
        (broken(PLAIN, 1, lambda actions: actions.remove(Action(Kind.FORWARD, 1))), "rank 1: B1 has no F1"),
        (broken(PLAIN, 0, lambda actions: actions.append(Action(Kind.FORWARD, 0))), "rank 0: F0 is there 2 times"),
        (broken(PLAIN, 0, lambda actions: actions.append(Action(Kind.FORWARD, 0, 1))), "rank 0: F0.1 is of no chunk in 0..0"),
        (broken(PLAIN, 0, lambda actions: actions.append(Action(Kind.FORWARD, 9))), "rank 0: F9 is of no microbatch in 0..2"),
        (broken(PLAIN, 1, lambda actions: swap(actions, "F0", "B0")), "are in the wrong order"),
        (broken(PLAIN, 0, lambda actions: swap(actions, "F2", "B2")), "are in the wrong order"),
        (broken(PLAIN, 0, lambda actions: swap(actions, "B0", "F0")), "wrong order"),
        (broken(broken(PLAIN, 0, lambda a: swap(a, "F0", "F2")), 1, lambda a: swap(a, "B0", "B2")), "wrong order"),
        (broken(WITH, 0, lambda actions: actions.remove(Action(Kind.SEND_FORWARD, 1))), "rank 0: SF1 is missing"),
        (broken(WITH, 1, lambda actions: actions.append(Action(Kind.SEND_FORWARD, 1))), "rank 1: SF1 passes what nobody needs"),
        (broken(WITH, 0, lambda actions: swap(actions, "F0", "SF0")), "SF0 comes before F0, which makes it"),
        (broken(WITH, 1, lambda actions: swap(actions, "RF0", "F0")), "RF0 comes after F0, which needs it"),
    ],
)  # fmt: skip
def test_the_first_violation_is_named(program: Program, words: str) -> None:
    assert words in (first_violation(program) or "")


def test_a_missing_input_and_a_missing_loss_are_named() -> None:
    cut = Program("cut", 1, 1, ((Action(Kind.FORWARD, 0), Action(Kind.BACKWARD, 0)), ()))
    assert first_violation(cut) is None
    assert first_violation(cut, exit_stages={0}) is None
    assert "B0 has no loss: stage 0 has no exit" in (first_violation(cut, exit_stages=()) or "")
    reverse = replace(cut, ranks=((), cut.ranks[0]))
    assert "F0 has no input, stage 0 never runs microbatch 0" in (first_violation(reverse) or "")


def test_deadlocks_are_found() -> None:
    """Both ranks compute in an order in which each waits for the other; and the blocking order that EE-LLM's schedule has."""
    crossed = Program("crossed", 2, 1, (
        (Action(Kind.FORWARD, 0), Action(Kind.BACKWARD, 0), Action(Kind.FORWARD, 1), Action(Kind.BACKWARD, 1)),
        (Action(Kind.FORWARD, 0), Action(Kind.FORWARD, 1), Action(Kind.BACKWARD, 0), Action(Kind.BACKWARD, 1)),
    ))  # fmt: skip
    assert "deadlock: what is to be computed next" in (first_violation(crossed) or "")
    sends_first = Program("sends_first", 2, 1, tuple(
        tuple(Action(Kind(kind), int(index)) for kind, index in (cell.rsplit(" ", 1) for cell in cells.split(",")))
        for cells in ("F 0,SF 0,F 1,SF 1,RB 0,B 0,RB 1,B 1", "RF 0,F 0,B 0,SB 0,RF 1,F 1,B 1,SB 1")
    ))  # fmt: skip
    assert "deadlock where sends wait for their receives (rank 0 at SF1, rank 1 at SB0)" in (first_violation(sends_first) or "")
    assert first_violation(with_communication(sends_first)) is None


def test_messages_are_received_in_the_order_in_which_they_are_sent() -> None:
    first, second = with_communication(gpipe(2, 2)).ranks
    receives = [Action(Kind.RECV_FORWARD, 1), Action(Kind.RECV_FORWARD, 0)]
    others = [action for action in second if action.kind is not Kind.RECV_FORWARD]
    swapped = Program("swapped", 2, 1, (first, (*receives, *others)))
    assert first_violation(swapped) == "message 0 from rank 0 to 1 is received as RF1, but RF0 was sent"


def test_in_flight_is_bounded_on_request() -> None:
    assert first_violation(gpipe(4, 8), in_flight=8) is None
    assert "rank 0 keeps the activations of 8 microbatches at a time, 4 are allowed" in (
        first_violation(gpipe(4, 8), in_flight=4) or ""
    )


@pytest.mark.parametrize(
    "program",
    [interleaved(2, 4, 3), with_communication(bubble_filling(fill(4, 10, {0, 1}))), zero_bubble_h1(3, 5), forward_only(2, 3)],
    ids=lambda program: program.name,
)
def test_csv_keeps_a_program(program: Program, tmp_path: Path) -> None:
    path = tmp_path / f"{program.name}.csv"
    write_csv(program, path)
    assert read_csv(path) == program


def test_csv_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("F0, F1,,B0,,B1\n,F0,B0,F1,B1\n\n")
    assert read_csv(path).ranks == one_f_one_b(2, 2).ranks
    path.write_text("F0,G1\n")
    with pytest.raises(ScheduleError, match=r"rank 0, cell 2: `G1` is no action"):
        read_csv(path)
    path.write_text("\n")
    with pytest.raises(ScheduleError, match="is empty"):
        read_csv(path)
    with pytest.raises(ScheduleError, match="cannot read"):
        read_csv(tmp_path / "nowhere.csv")
