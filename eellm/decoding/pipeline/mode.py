"""Decoding over pipeline stages: the stage whose head is sure emits, the next token starts at once, later stages fill their
keys and values in the background (EE-LLM, arXiv 2312.04916, section 4.1).

The first stage drives: requests, slots and stop conditions live there. What happens is the same on all tensor-parallel
ranks of a stage, so nothing may depend on which message arrives first. A clock decides instead: it ticks with every
message, the stages work one tick apart, and after tick t the first stage hears stage s about message t - s. Sequences whose
token is known go on meanwhile with the next message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eellm.decoding.continuation import Continuation, Token
from eellm.decoding.model.ragged import Span
from eellm.decoding.modes import Emitted
from eellm.decoding.pipeline.links import Links
from eellm.decoding.pipeline.messages import Kind, Message, Passenger, State
from eellm.decoding.pipeline.stage import PipelineStage
from eellm.decoding.policy import Policy
from eellm.decoding.queue import SegmentRunner


@dataclass
class _Flight:
    """Sequences whose next token stage `stage` is to say next, by their places in message `number` of `size` passengers."""

    number: int
    size: int
    sequences: dict[int, Continuation]
    stage: int = 1

    def deliver(self, tokens: Sequence[Token | None]) -> Emitted:
        """Emit what has been said, unless nobody wants it any more."""
        said = [(self.sequences.pop(place), token) for place, token in enumerate(tokens) if token is not None]
        wanted = [(sequence, token) for sequence, token in said if sequence.end is None]
        for sequence, token in wanted:
            sequence.emit(token)
        return wanted


class Pipelined:
    """The mode of the first of several stages; `eellm.decoding.pipeline.follower` is what runs on the others.

    A token passes all layers of a stage, whoever has emitted its successor, so nothing is ever pending here.
    """

    def __init__(self, runner: SegmentRunner, policy: Policy, links: Links):
        self.runner, self.policy, self.links = runner, policy, links
        self._stage = PipelineStage(runner, links)
        self._clock = 0
        self._flights: list[_Flight] = []

    def prefill(self, sequences: Sequence[Continuation], ends: Sequence[int]) -> Emitted:
        """Send prompts off; the final head says their first tokens, when the clock has come to it."""
        return self._depart(sequences, Kind.prefill, ends)

    def advance(self, sequences: Sequence[Continuation]) -> Emitted:
        """The tokens that become known next, of any running sequences; `sequences` may be on their way already."""
        emitted: Emitted = []
        while not emitted:
            ready = self._ready(sequences)
            emitted = self._depart(ready, Kind.step, [len(sequence.ids) for sequence in ready]) + self._arrivals()
        return emitted

    def drain(self, sequences: Sequence[Continuation]) -> None:
        """Wait until all stages have passed everything that was sent; tokens on their way are emitted later."""
        self.links.send(Message(Kind.drain))
        self.links.meet()

    def close(self) -> None:
        """Drain, and let the other stages end. Tokens on their way still reach their sequences."""
        while self._flights:
            self._depart([], Kind.step, [])
            self._arrivals()
        self.links.send(Message(Kind.end))
        self.links.finish()

    def _ready(self, sequences: Sequence[Continuation]) -> list[Continuation]:
        """Those that may go with the next message."""
        flying = {sequence for flight in self._flights for sequence in flight.sequences.values()}
        ready = [sequence for sequence in sequences if sequence not in flying]
        if self.policy.active:
            return ready
        # no exits spread the sequences over the stages: together, they would keep all stages but one waiting
        return ready[: math.ceil(len(sequences) / self.links.num_stages)]

    def _depart(self, sequences: Sequence[Continuation], kind: Kind, ends: Sequence[int]) -> Emitted:
        """The first stage's part of the next message, if there is anything to send; what is decided here is emitted."""
        self._clock += 1
        if not sequences:
            return []
        queues = [sequence.queue for sequence in sequences]
        passengers = [self._passenger(sequence, kind, end) for sequence, end in zip(sequences, ends, strict=True)]
        self.runner.push(queues, [sequence.ids[:end] for sequence, end in zip(sequences, ends, strict=True)])
        undecided = {place: sequence for place, sequence in enumerate(sequences) if passengers[place].state != State.decided}
        flight = _Flight(self._clock, len(sequences), undecided)
        message = Message(kind, passengers, queues[0].kv.shape.max_tokens)
        emitted = flight.deliver(self._stage.take(message, queues))
        if flight.sequences:
            self._flights.append(flight)
        return emitted

    def _passenger(self, sequence: Continuation, kind: Kind, end: int) -> Passenger:
        start, policy, request = len(sequence.queue), sequence.policy, sequence.request
        asks = kind == Kind.step and policy.active and len(sequence.tokens) >= policy.min_new_tokens
        state = State.asks if asks else State.waits
        if end < len(sequence.ids):  # a part of a prompt: what comes next is no question
            state = State.decided
        span = Span(sequence.queue.slot, start, end - start)
        return Passenger(span, state, sequence.draw, request.sampling, policy, request.alternatives)

    def _arrivals(self) -> Emitted:
        """What is said by now, oldest message first."""
        emitted: Emitted = []
        for flight in self._flights:
            while flight.sequences and flight.number + flight.stage <= self._clock:
                emitted += flight.deliver(self.links.hear(flight.stage, flight.size))
                flight.stage += 1
        self._flights = [flight for flight in self._flights if flight.sequences]
        return emitted
