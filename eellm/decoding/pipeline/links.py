"""The connections between the pipeline stages of one tensor-parallel column.

Every ordered pair of ranks has one stream at most, read in the order in which it is written: stage s writes messages to
stage s + 1, and every later stage writes answers to the first one. Sends do not wait for the receiver, up to a bound;
every wait ends with the process group's timeout.
Shape legend: r rows (tokens of all sequences, one after the other), h channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from eellm.decoding.continuation import Token
from eellm.decoding.pipeline.messages import Message, WireFormat
from eellm.mcore.groups import Group, Groups

MAX_IN_FLIGHT = 8
"""Messages that a stage may be ahead of the next one."""


class Outbox:
    """Sends under way to one rank, oldest first, with what they send; `limit` batches of them at most."""

    def __init__(self, limit: int):
        self._limit = limit
        self._batches: deque[list[tuple[dist.Work, torch.Tensor]]] = deque()

    def send(self, receiver: int, parts: Sequence[tuple[torch.Tensor, Group]]) -> None:
        """Begin to send tensors to a rank of their groups; waits for older ones beyond the limit."""
        self.wait(self._limit - 1)
        batch = []
        for tensor, group in parts:
            work = dist.isend(tensor, group=group, group_dst=receiver)
            assert work is not None, "this rank belongs to the group"
            batch.append((work, tensor))
        self._batches.append(batch)

    def wait(self, most: int = 0) -> None:
        """Until at most so many batches are under way."""
        while len(self._batches) > most:
            for work, _ in self._batches.popleft():
                work.wait()


class Links:
    """This rank's ends of the connections; a rank of a group is a stage.

    What is read on the CPU goes through `control`: on GPUs a group of its own, since one that also carries rows would make
    both directions between two stages wait for each other.
    """

    def __init__(self, groups: Groups, wire: WireFormat, dtype: torch.dtype):
        self.wire, self.device, self.dtype = wire, groups.device, dtype
        self.stage, self.num_stages = groups.pp_rank, groups.layout.pp
        self.rows = groups.pp
        self.control = groups.pp if groups.device.type == "cpu" else control_group(groups)
        self._messages = Outbox(MAX_IN_FLIGHT)
        # the first stage is never more than one answer a stage and one prompt behind: this bound makes nobody wait
        self._answers = Outbox(self.num_stages + 2)

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def send(self, message: Message) -> None:
        """To the next stage."""
        parts = [(self.wire.write_message(message), self.control)]
        if message.hidden is not None:
            parts.append((message.hidden.contiguous(), self.rows))
        self._messages.send(self.stage + 1, parts)

    def receive(self) -> Message:
        """The next message of the stage before."""
        written = self.wire.message()
        dist.recv(written, group=self.control, group_src=self.stage - 1)
        message = self.wire.read_message(written)
        if message.passengers:
            message.hidden = torch.empty(message.num_rows, 1, self.wire.spec.hidden_size, dtype=self.dtype, device=self.device)
            dist.recv(message.hidden, group=self.rows, group_src=self.stage - 1)
        return message

    def answer(self, tokens: Sequence[Token | None]) -> None:
        """To the first stage."""
        self._answers.send(0, [(self.wire.write_answer(tokens), self.control)])

    def hear(self, stage: int, count: int) -> list[Token | None]:
        """A stage's next answer, which is about so many passengers."""
        written = self.wire.answer()
        dist.recv(written, group=self.control, group_src=stage)
        return self.wire.read_answer(written, count)

    def meet(self) -> None:
        """Wait until all stages have come here."""
        self._messages.wait()
        dist.barrier(group=self.control)

    def finish(self) -> None:
        """`meet`, and nothing is under way any more."""
        self._answers.wait()
        self.meet()


def control_group(groups: Groups) -> Group:
    """This column's stages over gloo; every rank makes every group, in the same order."""
    own = None
    for ranks in groups.layout.groups_over(list(range(groups.layout.pp))):
        group = dist.new_group(ranks, backend="gloo")
        if groups.rank in ranks:
            own = group
    assert own is not None
    return own
