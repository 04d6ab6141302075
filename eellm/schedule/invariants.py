"""What every program must keep to; `first_violation` says which rule one breaks first, and where."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator

from eellm.schedule.program import (
    COMMUNICATION,
    FORWARDS,
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Program,
    ScheduleError,
    with_communication,
)

Violations = Iterator[str]
_AFTER = {Kind.BACKWARD: (Kind.FORWARD,), Kind.WEIGHT: (Kind.BACKWARD,), Kind.FORWARD: (Kind.BACKWARD,)}


def first_violation(program: Program, exit_stages: Collection[int] | None = None, in_flight: int | None = None) -> str | None:
    """None where a program is right. Sends and receives are checked if there are any, and are derived otherwise.

    `exit_stages`: stages with exits, to find backward passes that start from no loss; None = do not look. `in_flight`: most
    microbatches that a rank may keep activations of; None = any number.
    """
    rules: list[Callable[[], Violations]] = [
        lambda: _names_exist(program),
        lambda: _passes_belong_together(program),
        lambda: _microbatches_pass_all_stages_in_order(program),
        lambda: _backward_starts_from_a_loss(program, exit_stages),
        lambda: _is_bounded(program, in_flight),
        lambda: _communication(program),
    ]
    return next((violation for rule in rules for violation in rule()), None)


def checked(program: Program, exit_stages: Collection[int] | None = None, in_flight: int | None = None) -> Program:
    """The program; raises ScheduleError where it breaks a rule."""
    violation = first_violation(program, exit_stages, in_flight)
    if violation is not None:
        raise ScheduleError(f"{program.name}: {violation}")
    return program


def most_in_flight(program: Program, stages: Collection[int] | None = None) -> list[int]:
    """By rank: the most forward passes, over its chunks, whose activations exist at a time. `stages`: of these alone."""
    peaks = []
    for rank, actions in enumerate(program.computation.ranks):
        current = peak = 0
        for action in actions:
            if stages is not None and program.stage(rank, action.chunk) not in stages:
                continue
            current += action.kind is Kind.FORWARD
            peak = max(peak, current)
            current -= action.kind is _releasing(program, rank, action)
        peaks.append(peak)
    return peaks


def _releasing(program: Program, rank: int, action: Action) -> Kind:
    """The kind after which a microbatch's activations are gone: the last of its backward pass."""
    split = Kind.WEIGHT in program.passes[program.stage(rank, action.chunk), action.microbatch]
    return Kind.WEIGHT if split else Kind.BACKWARD


def _names_exist(program: Program) -> Violations:
    if not program.ranks:
        yield "there are no ranks"
    for rank, actions in enumerate(program.ranks):
        for action, count in Counter(actions).items():
            if not 0 <= action.chunk < program.num_chunks:
                yield f"rank {rank}: {action} is of no chunk in 0..{program.num_chunks - 1}"
            if not 0 <= action.microbatch < program.num_microbatches:
                yield f"rank {rank}: {action} is of no microbatch in 0..{program.num_microbatches - 1}"
            if count > 1:
                yield f"rank {rank}: {action} is there {count} times"


def _passes_belong_together(program: Program) -> Violations:
    """Each F has its B after it, each B and W what it follows; nothing is both F and N."""
    for rank, actions in enumerate(program.computation.ranks):
        place = {action: index for index, action in enumerate(actions)}
        for action, index in place.items():
            for other in _AFTER.get(action.kind, ()):
                partner = action._replace(kind=other)
                if partner not in place:
                    yield f"rank {rank}: {action} has no {partner}"
                elif (place[partner] < index) != (action.kind is not Kind.FORWARD):
                    yield f"rank {rank}: {partner} and {action} are in the wrong order"
            if action.kind is Kind.FORWARD_ONLY and action._replace(kind=Kind.FORWARD) in place:
                yield f"rank {rank}: {action} is back-propagated, and is not"


def _microbatches_pass_all_stages_in_order(program: Program) -> Violations:
    for rank, actions in enumerate(program.computation.ranks):
        for action in actions:
            stage = program.stage(rank, action.chunk)
            if action.kind not in FORWARDS or stage == 0:
                continue
            if not program.runs_forward(stage - 1, action.microbatch):
                yield f"rank {rank}: {action} has no input, stage {stage - 1} never runs microbatch {action.microbatch} forward"
    for microbatch in range(program.num_microbatches):
        if not program.runs_forward(0, microbatch):
            yield f"microbatch {microbatch} is never run"


def _backward_starts_from_a_loss(program: Program, exit_stages: Collection[int] | None) -> Violations:
    for rank, actions in enumerate(program.computation.ranks if exit_stages is not None else ()):
        for action in actions:
            if action.kind is not Kind.BACKWARD or program.transfer_into(action, rank) is not None:
                continue
            stage = program.stage(rank, action.chunk)
            if stage + 1 < program.num_stages and stage not in (exit_stages or ()):
                reason = f"stage {stage} has no exit, and no gradient comes from stage {stage + 1}"
                yield f"rank {rank}: {action} has no loss: {reason}"


def _is_bounded(program: Program, in_flight: int | None) -> Violations:
    for rank, peak in enumerate(most_in_flight(program) if in_flight is not None else ()):
        if in_flight is not None and peak > in_flight:
            yield f"rank {rank} keeps the activations of {peak} microbatches at a time, {in_flight} are allowed"


def _communication(program: Program) -> Violations:
    try:
        derived = with_communication(program)
    except ScheduleError as error:
        yield str(error)
        return
    if program.has_communication:
        yield from _what_is_needed_is_sent(program, derived)
        yield from _transfers_stand_where_they_are_needed(program)
        yield from _order_of_sends_and_receives(program)
    yield from _deadlock(program if program.has_communication else derived)


def _what_is_needed_is_sent(program: Program, derived: Program) -> Violations:
    for rank, (given, needed) in enumerate(zip(program.ranks, derived.ranks, strict=True)):
        given_, needed_ = ({action for action in actions if action.kind in COMMUNICATION} for actions in (given, needed))
        for action in sorted(needed_ - given_):
            yield f"rank {rank}: {action} is missing"
        for action in sorted(given_ - needed_):
            yield f"rank {rank}: {action} passes what nobody needs"


def _transfers_stand_where_they_are_needed(program: Program) -> Violations:
    for rank, actions in enumerate(program.ranks):
        place = {action: index for index, action in enumerate(actions)}
        for action, index in place.items():
            if action.kind in COMMUNICATION:
                continue
            before, after = program.transfer_into(action, rank), program.transfer_out(action, rank)
            if before is not None and before[1] != rank and place[before[0]] > index:
                yield f"rank {rank}: {before[0]} comes after {action}, which needs it"
            if after is not None and after[2] != rank and place[after[0]] < index:
                yield f"rank {rank}: {after[0]} comes before {action}, which makes it"


def _order_of_sends_and_receives(program: Program) -> Violations:
    """Messages between two ranks have no names: the n-th sent is the n-th received."""
    sent, received = _messages(program)
    for pair, messages in sent.items():
        for index, (send, receive) in enumerate(zip(messages, received[pair], strict=True)):
            if send != receive:
                yield f"message {index} from rank {pair[0]} to {pair[1]} is received as {receive}, but {send} was sent"


def _messages(program: Program) -> tuple[dict[tuple[int, int], list[Action]], dict[tuple[int, int], list[Action]]]:
    """By (sender, receiver): what is sent and what is received, in order, both as the receive."""
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for rank, actions in enumerate(program.ranks):
        for action in actions:
            if action.kind in SENDS:
                receive, other = matching_receive(program, rank, action)
                sent.setdefault((rank, other), []).append(receive)
            elif action.kind in RECEIVES:
                received.setdefault((sender_of(program, rank, action), rank), []).append(action)
    return sent, received


def matching_receive(program: Program, rank: int, send: Action) -> tuple[Action, int]:
    """The receive of a send, and its rank."""
    step, kind = (1, Kind.RECV_FORWARD) if send.kind is Kind.SEND_FORWARD else (-1, Kind.RECV_BACKWARD)
    other, chunk = program.place(program.stage(rank, send.chunk) + step)
    return Action(kind, send.microbatch, chunk), other


def sender_of(program: Program, rank: int, receive: Action) -> int:
    step = -1 if receive.kind is Kind.RECV_FORWARD else 1
    return program.place(program.stage(rank, receive.chunk) + step)[0]


def _deadlock(program: Program) -> Violations:
    """Every send and receive waits until the other rank has come to its own (rendezvous): the strictest transport."""
    queues = [deque(actions) for actions in program.ranks]
    moved = True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            while queue and queue[0].kind not in COMMUNICATION:
                queue.popleft()
                moved = True
            if queue and queue[0].kind in SENDS:
                receive, other = matching_receive(program, rank, queue[0])
                if queues[other] and queues[other][0] == receive:
                    queue.popleft()
                    queues[other].popleft()
                    moved = True
    stuck = [f"rank {rank} at {queue[0]}" for rank, queue in enumerate(queues) if queue]
    if stuck:
        yield f"deadlock where sends wait for their receives ({', '.join(stuck)})"
