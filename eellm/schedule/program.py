"""A pipeline schedule as data: for every rank, the actions it does, in order.

Stages are numbered as in `eellm.layout`: chunk c of rank r is stage c * P + r. What passes between ranks follows from the
computation; `with_communication` writes it down where an executor needs to see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from eellm.errors import UserError


class ScheduleError(UserError):
    """A program that cannot run, or a schedule that does not exist for these numbers; says what is violated."""


class Kind(StrEnum):
    """What is done; the values are those of CSV files."""

    FORWARD = "F"
    """Forward pass; what its backward pass needs is kept."""
    FORWARD_ONLY = "N"
    """Forward pass of a microbatch that is not back-propagated on this stage: nothing is kept."""
    BACKWARD = "B"
    """Backward pass, exits included; where a WEIGHT of the same microbatch follows, to the inputs only."""
    WEIGHT = "W"
    """The part of the backward pass that makes gradients of weights, on its own (zero bubble)."""
    SEND_FORWARD = "SF"
    RECV_FORWARD = "RF"
    SEND_BACKWARD = "SB"
    RECV_BACKWARD = "RB"


FORWARDS = (Kind.FORWARD, Kind.FORWARD_ONLY)
SENDS = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
RECEIVES = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)
COMMUNICATION = (*SENDS, *RECEIVES)


class Action(NamedTuple):
    """`microbatch` is an index into the global batch of a data-parallel rank, so that data and labels always match."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


class Step(NamedTuple):
    """An action with what does not depend on costs: its stage, the number of its work, and the numbers of the messages that it
    waits for and makes (-1: none)."""

    action: Action
    stage: int
    work: int
    waits_for: int
    makes: int


_KINDS = (Kind.FORWARD, Kind.FORWARD_ONLY, Kind.BACKWARD, Kind.WEIGHT)


def work_number(stage: int, kind: Kind, split: bool) -> int:
    """Numbers stage, kind and whether the backward pass is split, without gaps."""
    return (2 * stage + split) * len(_KINDS) + _KINDS.index(kind)


@dataclass(frozen=True)
class Program:
    """`ranks[r]` are the actions of pipeline rank r."""

    name: str
    num_microbatches: int
    num_chunks: int
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def pp(self) -> int:
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        return self.pp * self.num_chunks

    def stage(self, rank: int, chunk: int) -> int:
        return chunk * self.pp + rank

    def place(self, stage: int) -> tuple[int, int]:
        """(rank, chunk) of a stage."""
        return stage % self.pp, stage // self.pp

    @cached_property
    def computation(self) -> Program:
        """The same without communication."""
        kept = tuple(tuple(action for action in actions if action.kind not in COMMUNICATION) for actions in self.ranks)
        return replace(self, ranks=kept)

    @property
    def has_communication(self) -> bool:
        return any(action.kind in COMMUNICATION for action in self._actions())

    @cached_property
    def passes(self) -> dict[tuple[int, int], set[Kind]]:
        """(stage, microbatch) -> kinds of computation that happen there."""
        found: dict[tuple[int, int], set[Kind]] = {}
        for rank, actions in enumerate(self.computation.ranks):
            for kind, microbatch, chunk in actions:
                found.setdefault((self.stage(rank, chunk), microbatch), set()).add(kind)
        return found

    def runs_forward(self, stage: int, microbatch: int) -> bool:
        return not self.passes.get((stage, microbatch), set()).isdisjoint(FORWARDS)

    def runs_backward(self, stage: int, microbatch: int) -> bool:
        return Kind.BACKWARD in self.passes.get((stage, microbatch), ())

    def needed(self, stage: int, action: Action) -> tuple[int, int, int] | None:
        """What an action waits for: (the stage that makes it, microbatch, 1 for hidden states and -1 for gradients)."""
        if action.kind in FORWARDS:
            return (stage - 1, action.microbatch, 1) if stage else None
        if action.kind is Kind.BACKWARD and self.runs_backward(stage + 1, action.microbatch):
            return stage + 1, action.microbatch, -1
        return None

    @cached_property
    def steps(self) -> list[list[Step]]:
        """The computation by rank, looked up once: programs are simulated with many costs."""
        ranks = self.computation.ranks
        return [[self._step(rank, action) for action in actions] for rank, actions in enumerate(ranks)]

    def _step(self, rank: int, action: Action) -> Step:
        stage = self.stage(rank, action.chunk)
        needed, direction = self.needed(stage, action), 1 if action.kind in FORWARDS else -1
        makes = -1 if action.kind is Kind.WEIGHT else self._message(stage, action.microbatch, direction)
        work = work_number(stage, action.kind, Kind.WEIGHT in self.passes[stage, action.microbatch])
        return Step(action, stage, work, -1 if needed is None else self._message(*needed), makes)

    def _message(self, stage: int, microbatch: int, direction: int) -> int:
        """Odd for hidden states, even for gradients."""
        return 2 * (stage * self.num_microbatches + microbatch) + (direction > 0)

    def transfer_into(self, action: Action, rank: int) -> tuple[Action, int] | None:
        """(receive, sender's rank) that must come before a computation, if it needs one: hidden states of the stage before,
        or the gradient of the stage after where that back-propagates the microbatch too."""
        stage = self.stage(rank, action.chunk)
        if action.kind in FORWARDS and stage > 0:
            return Action(Kind.RECV_FORWARD, action.microbatch, action.chunk), self.place(stage - 1)[0]
        if action.kind is Kind.BACKWARD and stage + 1 < self.num_stages and self.runs_backward(stage + 1, action.microbatch):
            return Action(Kind.RECV_BACKWARD, action.microbatch, action.chunk), self.place(stage + 1)[0]
        return None

    def transfer_out(self, action: Action, rank: int) -> tuple[Action, Action, int] | None:
        """(send, the receive that matches it, receiver's rank) that a computation makes necessary, if any."""
        stage, microbatch = self.stage(rank, action.chunk), action.microbatch
        if action.kind in FORWARDS and stage + 1 < self.num_stages and self.runs_forward(stage + 1, microbatch):
            other, chunk = self.place(stage + 1)
            return Action(Kind.SEND_FORWARD, *action[1:]), Action(Kind.RECV_FORWARD, microbatch, chunk), other
        if action.kind is Kind.BACKWARD and stage > 0 and self.runs_backward(stage - 1, microbatch):
            other, chunk = self.place(stage - 1)
            return Action(Kind.SEND_BACKWARD, *action[1:]), Action(Kind.RECV_BACKWARD, microbatch, chunk), other
        return None

    def _actions(self) -> Iterator[Action]:
        for actions in self.ranks:
            yield from actions


def with_communication(program: Program) -> Program:
    """Every send after the computation it hands on, and its receive at the same moment of the other rank's list.

    All ranks advance side by side, an action each in turn. The moments are those of one clock, so sends and receives of any
    two ranks have one order, and no order of waiting for each other's rendezvous can close a circle. Raises ScheduleError
    where the computation itself waits for something that never comes.
    """
    program = program.computation
    lists: list[list[Action]] = [[] for _ in program.ranks]
    position, arrived = [0] * program.pp, [set[Action]() for _ in program.ranks]
    while any(place < len(actions) for place, actions in zip(position, program.ranks, strict=True)):
        ready = [rank for rank in range(program.pp) if _is_ready(program, rank, position[rank], arrived[rank])]
        if not ready:
            raise ScheduleError(_waiting(program, position))
        for rank in ready:
            action = program.ranks[rank][position[rank]]
            position[rank] += 1
            lists[rank].append(action)
            transfer = program.transfer_out(action, rank)
            if transfer is None:
                continue
            send, receive, other = transfer
            arrived[other].add(receive)
            if other != rank:
                lists[rank].append(send)
                lists[other].append(receive)
    return replace(program, ranks=tuple(map(tuple, lists)))


def _is_ready(program: Program, rank: int, position: int, arrived: set[Action]) -> bool:
    if position >= len(program.ranks[rank]):
        return False
    transfer = program.transfer_into(program.ranks[rank][position], rank)
    return transfer is None or transfer[0] in arrived


def _waiting(program: Program, position: list[int]) -> str:
    stuck = [
        f"rank {rank} at {actions[place]}"
        for rank, (place, actions) in enumerate(zip(position, program.ranks, strict=True))
        if place < len(actions)
    ]
    return f"deadlock: what is to be computed next waits for other ranks for ever ({', '.join(stuck)})"


def forwards(microbatches: Iterable[int], chunk: int = 0) -> list[Action]:
    return [Action(Kind.FORWARD, microbatch, chunk) for microbatch in microbatches]


def backwards(microbatches: Iterable[int], chunk: int = 0) -> list[Action]:
    return [Action(Kind.BACKWARD, microbatch, chunk) for microbatch in microbatches]


def one_by_one(first: list[Action], second: list[Action]) -> list[Action]:
    """Alternating, as long as both last; then the rest of the second."""
    both = [action for pair in zip(first, second, strict=False) for action in pair]
    return both + first[len(second) :] + second[len(first) :]
