"""What any stage of a pipeline does with a message: its layers, its exits' opinions, and everybody's keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eellm.decoding.continuation import Token
from eellm.decoding.pipeline.links import Links
from eellm.decoding.pipeline.messages import Message, State, read_statistics, written_statistics
from eellm.decoding.queue import SegmentQueue, SegmentRunner
from eellm.decoding.reading import Reading


class PipelineStage:
    """Every row passes all of the stage's layers and blocks; heads are asked only about tokens that are still undecided."""

    def __init__(self, runner: SegmentRunner, links: Links):
        self.runner, self.links = runner, links

    def take(self, message: Message, queues: Sequence[SegmentQueue]) -> list[Token | None]:
        """Pass a message whose rows wait in front of the first segment, and send it on; returns the tokens chosen here.

        A later stage tells them the first one as soon as none of its heads can add to them.
        """
        tokens: list[Token | None] = [None] * len(queues)
        arrived_undecided = bool(message.undecided)
        passed = self._ask_exits(message, queues, tokens)
        if self.links.is_last and message.undecided:
            self._pass(queues, passed)
            passed = len(self.runner.model.segments)
            places = message.undecided
            reading = self.runner.read_final([queues[place] for place in places])
            for row, place in enumerate(places):
                self._choose(message, tokens, place, reading.at(row))
        if self.links.stage > 0 and arrived_undecided:
            self.links.answer(tokens)
        self._pass(queues, passed)
        if not self.links.is_last:
            message.hidden = torch.cat([queue.arrived for queue in queues])
            self.links.send(message)
        self.runner.fill_blocks(queues)
        return tokens

    def _ask_exits(self, message: Message, queues: Sequence[SegmentQueue], tokens: list[Token | None]) -> int:
        """Pass segments while an exit behind them may be asked; returns how many."""
        model = self.runner.model
        exits = [index for index, segment in enumerate(model.segments) if segment.exit is not None]
        passed = 0
        for index in exits:
            if not message.asking:
                break
            self._pass(queues, passed, index + 1)
            passed = index + 1
            self._ask(message, queues, tokens, index)
        return passed

    def _ask(self, message: Message, queues: Sequence[SegmentQueue], tokens: list[Token | None], index: int) -> None:
        """Let the passengers' policies decide about what the exit behind a segment says."""
        exit_ = self.runner.model.segments[index].exit
        assert exit_ is not None
        places = [place for place in message.asking if exit_.head.layer in message.passengers[place].policy.active]
        if not places:
            return
        reading = self.runner.read_exit([queues[place] for place in places], index)
        for place, values in zip(places, written_statistics(reading.statistics), strict=True):
            message.passengers[place].said.append(values)
        for policy in {message.passengers[place].policy: None for place in places}:
            rows = [row for row, place in enumerate(places) if message.passengers[place].policy == policy]
            said = [message.passengers[places[row]].said for row in rows]
            seen = [read_statistics(values, reading.logits.device) for values in zip(*said, strict=True)]
            for row, leaves in zip(rows, policy.decide(seen).tolist(), strict=True):
                if leaves:
                    self._choose(message, tokens, places[row], reading.at(row))

    def _choose(self, message: Message, tokens: list[Token | None], place: int, reading: Reading) -> None:
        passenger = message.passengers[place]
        tokens[place] = Token.chosen(reading, passenger.sampling, passenger.draw, passenger.alternatives)
        passenger.state = State.decided

    def _pass(self, queues: Sequence[SegmentQueue], start: int, end: int | None = None) -> None:
        end = len(self.runner.model.segments) if end is None else end
        if start < end:
            self.runner.advance(queues, start, end - 1)
