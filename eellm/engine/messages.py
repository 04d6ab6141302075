"""What a program's ranks send each other: hidden states forward, gradients back, all of one shape."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist

from eellm.mcore.groups import Groups
from eellm.schedule.invariants import matching_receive, sender_of
from eellm.schedule.program import COMMUNICATION, FORWARDS, RECEIVES, Action, Kind, Program

AHEAD = 2
"""Receives that wait for their messages before it is their turn, where the transport allows it: sends then need not wait."""


class Messages:
    """Of one rank in one step. `shape` is that of hidden states, [s, b, h] (s divided by tp under sequence parallelism).

    Messages have no names: between two ranks the n-th that is sent is the n-th that is received.
    """

    def __init__(self, program: Program, groups: Groups, shape: tuple[int, ...], dtype: torch.dtype):
        self.program, self.groups, self.shape, self.dtype = program, groups, shape, dtype
        self.rank = groups.pp_rank
        self._reached = self._expected = 0
        self._to_receive = deque(action for action in program.ranks[self.rank] if action.kind in RECEIVES)
        self._under_way: dict[Action, tuple[torch.Tensor, dist.Work]] = {}
        self._arrived: dict[Action, torch.Tensor] = {}
        self._made: dict[Action, torch.Tensor] = {}
        self._sending: deque[tuple[torch.Tensor, dist.Work]] = deque()
        # operations between two ranks run one after the other under NCCL: there every rank keeps to the program's order
        self._ahead = AHEAD if groups.device.type == "cpu" else 0

    def empty(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.groups.device)

    def receive(self, action: Action) -> None:
        """Be ready for a message. It may come later: who needs it waits, so that a rank computes on meanwhile."""
        self._reached += 1
        self._listen()

    def wait_for_input(self, action: Action) -> None:
        """Return when what a pass takes in is there, if it comes from another rank."""
        expected = action._replace(kind=Kind.RECV_FORWARD if action.kind in FORWARDS else Kind.RECV_BACKWARD)
        if action.kind not in COMMUNICATION and expected in self._under_way:
            tensor, work = self._under_way.pop(expected)
            work.wait()
            self._arrived[expected] = tensor

    def send(self, action: Action) -> None:
        """Hand on what has been made; returns before it has arrived, where not too much is on its way already."""
        self._listen()
        tensor = self._made.pop(action)
        work = dist.isend(tensor, group=self.groups.pp, group_dst=matching_receive(self.program, self.rank, action)[1])
        assert work is not None
        self._sending.append((tensor, work))
        while self._sending and self._sending[0][1].is_completed():
            self._sending.popleft()
        # gloo says that a message has gone only to who waits for it. A valid program hangs not even where every send waits for
        # its receive, so waiting for old ones is safe, and rarely long: a rank is seldom more than the pipeline's depth ahead
        while len(self._sending) > self.groups.layout.pp:
            self._sending.popleft()[1].wait()

    def hidden(self, action: Action) -> torch.Tensor | None:
        """What a forward pass takes in; None on the first stage."""
        return self._arrived.pop(action._replace(kind=Kind.RECV_FORWARD), None)

    def gradient(self, action: Action) -> torch.Tensor | None:
        """Of the output of a backward pass; None where the next stage does not back-propagate the microbatch."""
        return self._arrived.pop(action._replace(kind=Kind.RECV_BACKWARD), None)

    def made(self, action: Action, tensor: torch.Tensor) -> None:
        """Keep a pass's result for its send, if it has one."""
        if self.program.transfer_out(action, self.rank) is not None:
            kind = Kind.SEND_FORWARD if action.kind in FORWARDS else Kind.SEND_BACKWARD
            self._made[action._replace(kind=kind)] = tensor.detach()

    def finish(self) -> None:
        """Wait until everything that was sent has gone; nothing else may be left."""
        for _, work in self._sending:
            work.wait()
        left = [*self._to_receive, *self._under_way, *self._arrived, *self._made]
        assert not left, f"never used: {', '.join(map(str, left))}"

    def _listen(self) -> None:
        """Expect, in the program's order, the messages that it has come to, and some ahead."""
        while self._to_receive and self._expected < self._reached + self._ahead:
            action = self._to_receive.popleft()
            tensor = self.empty()
            source = sender_of(self.program, self.rank, action)
            work = dist.irecv(tensor, group=self.groups.pp, group_src=source)
            assert work is not None
            self._under_way[action] = tensor, work
            self._expected += 1
