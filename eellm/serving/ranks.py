"""The ranks of a served model do the same work: rank 0 says what, tick by tick, and the others of its stage follow.

Later pipeline stages follow the first one's decoder (`eellm.decoding.pipeline.follower`). Whoever waits for a rank that is
silent or gone fails within the time limit of the process groups; while nobody asks for anything, ranks meet now and then.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from eellm.config.schema import DecodingMode
from eellm.decoding.continuation import Continuation, End, Request, Token
from eellm.decoding.decoder import Decoder
from eellm.mcore.groups import Groups


@dataclass(frozen=True)
class Submission:
    number: int
    mode: DecodingMode
    ids: Sequence[int]
    request: Request


@dataclass(frozen=True)
class Tick:
    """What all ranks of the first stage do next: stop sequences, begin some, take a step, meet; with `end`, nothing any more."""

    stops: list[int] = field(default_factory=list)
    submissions: list[Submission] = field(default_factory=list)
    meet: bool = False
    end: bool = False


@dataclass(frozen=True)
class Emission:
    """A sequence's next token; `end` where it is the last one."""

    number: int
    token: Token
    end: End | None


class Replica:
    """One rank's decoders, each serving some modes, and the sequences that they run. `stages` of a pipeline are several."""

    def __init__(self, decoders: dict[DecodingMode, Decoder], stages: int = 1):
        self.decoders, self._stages = decoders, stages
        self._distinct = list(dict.fromkeys(decoders.values()))
        self._sequences: dict[int, Continuation] = {}

    def reserve(self) -> None:
        """Take all memory now. Raises ConfigError where there is not enough."""
        for decoder in self._distinct:
            decoder.reserve()

    def apply(self, tick: Tick) -> list[Emission]:
        for number in tick.stops:
            if number in self._sequences:
                self._sequences.pop(number).stopped = True
        for submission in tick.submissions:
            decoder = self.decoders[submission.mode]
            self._sequences[submission.number] = decoder.submit(submission.ids, submission.request)
        numbers = {sequence: number for number, sequence in self._sequences.items()}
        emitted = [pair for decoder in self._distinct if not decoder.idle for pair in decoder.step()]
        emissions = []
        for sequence, token in emitted:
            last = token is sequence.tokens[-1]
            emissions.append(Emission(numbers[sequence], token, sequence.end if last else None))
        self._sequences = {number: sequence for number, sequence in self._sequences.items() if sequence.end is None}
        if tick.meet and self._stages > 1:
            for decoder in self._distinct:
                decoder.drain()
        return emissions

    def close(self) -> None:
        for decoder in self._distinct:
            decoder.close()


class Ranks:
    """This rank's tie to the other tensor-parallel ranks of the first stage. Every rank of the layout makes it."""

    def __init__(self, groups: Groups, timeout: float):
        layout = groups.layout
        members = [layout.rank(tp_rank, 0, 0) for tp_rank in range(layout.tp)]
        self.alone = layout.tp * layout.pp == 1
        self._group = None
        if layout.tp > 1:  # control goes over the CPU, also on GPUs
            self._group = dist.new_group(members, backend="gloo", timeout=datetime.timedelta(seconds=timeout))

    def share(self, tick: Tick | None) -> Tick:
        """Rank 0's next tick, on all of them."""
        if self._group is None:
            assert tick is not None
            return tick
        box = [tick]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        assert box[0] is not None
        if box[0].meet:
            dist.barrier(group=self._group)
        return box[0]

    def follow(self, replica: Replica) -> None:
        """What the other ranks do, until rank 0 says that it was the last tick."""
        while not (tick := self.share(None)).end:
            replica.apply(tick)
        replica.close()
