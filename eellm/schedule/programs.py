"""The schedules of the field as pure functions of pipeline ranks, microbatches and chunks. Bubble filling has its own file."""

from __future__ import annotations

from eellm.schedule.program import Action, Kind, Program, ScheduleError, backwards, forwards, one_by_one


def gpipe(pp: int, num_microbatches: int) -> Program:
    """All forward passes, then all backward passes (arXiv 1811.06965)."""
    everything = range(num_microbatches)
    return _same("gpipe", num_microbatches, [[*forwards(everything), *backwards(everything)] for _ in range(pp)])


def forward_only(pp: int, num_microbatches: int, num_chunks: int = 1) -> Program:
    """Nothing is back-propagated: validation, and EE-Tuning with a frozen backbone (arXiv 2402.00518)."""
    order = interleaved_order(pp, num_microbatches, num_chunks)
    actions = [Action(Kind.FORWARD_ONLY, microbatch, chunk) for microbatch, chunk in order]
    return _same("forward_only", num_microbatches, [actions] * pp, num_chunks)


def one_f_one_b(pp: int, num_microbatches: int) -> Program:
    """Warm-up, then a forward and a backward in turn (PipeDream-flush), as megatron-core's schedule without interleaving."""
    ranks = []
    for rank in range(pp):
        warmup = min(pp - rank - 1, num_microbatches)
        steady = one_by_one(forwards(range(warmup, num_microbatches)), backwards(range(num_microbatches)))
        ranks.append([*forwards(range(warmup)), *steady])
    return _same("one_f_one_b", num_microbatches, ranks)


def interleaved_order(pp: int, num_microbatches: int, num_chunks: int) -> list[tuple[int, int]]:
    """(microbatch, chunk) of a rank's forward passes: groups of P microbatches through all chunks (`get_schedule_table`)."""
    return [
        (microbatch, chunk)
        for group in range(0, num_microbatches, pp)
        for chunk in range(num_chunks)
        for microbatch in range(group, min(group + pp, num_microbatches))
    ]


def interleaved(pp: int, num_microbatches: int, num_chunks: int) -> Program:
    """Interleaved 1F1B (arXiv 2104.04473), the order of megatron-core's `forward_backward_pipelining_with_interleaving`."""
    if pp < 2 or num_chunks < 2:
        raise ScheduleError(f"interleaving needs two ranks and two chunks, not {pp} and {num_chunks}")
    if num_microbatches % pp:
        raise ScheduleError(f"interleaving needs a multiple of {pp} microbatches, not {num_microbatches}")
    order = interleaved_order(pp, num_microbatches, num_chunks)
    forward = [Action(Kind.FORWARD, microbatch, chunk) for microbatch, chunk in order]
    backward = [Action(Kind.BACKWARD, microbatch, num_chunks - 1 - chunk) for microbatch, chunk in order]
    ranks = []
    for rank in range(pp):
        warmup = min(2 * (pp - rank - 1) + (num_chunks - 1) * pp, len(forward))
        ranks.append([*forward[:warmup], *one_by_one(forward[warmup:], backward)])
    return _same("interleaved", num_microbatches, ranks, num_chunks)


def zero_bubble_h1(pp: int, num_microbatches: int) -> Program:
    """ZB-H1 (arXiv 2401.10241): 1F1B whose gradients of weights wait, on rank r for r microbatches, and fill the cool-down.

    To simulate: no engine here splits a backward pass.
    """
    ranks = []
    for rank in range(pp):
        warmup = min(pp - rank - 1, num_microbatches)
        actions = forwards(range(warmup))
        for index in range(num_microbatches):
            if warmup + index < num_microbatches:
                actions += forwards([warmup + index])
            actions += backwards([index])
            if index >= rank:
                actions.append(Action(Kind.WEIGHT, index - rank))
        late = range(max(0, num_microbatches - rank), num_microbatches)
        ranks.append([*actions, *(Action(Kind.WEIGHT, microbatch) for microbatch in late)])
    return _same("zero_bubble_h1", num_microbatches, ranks)


def _same(name: str, num_microbatches: int, ranks: list[list[Action]], num_chunks: int = 1) -> Program:
    return Program(name, num_microbatches, num_chunks, tuple(map(tuple, ranks)))
