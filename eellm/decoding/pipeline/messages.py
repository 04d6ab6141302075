"""What the stages of a pipeline tell each other while they decode, and how it is written down.

A message goes from stage to stage: whose rows come, what has been said about them, and then the rows. An answer goes from a
stage straight back to the first one. Both have a fixed size, so that no size is sent ahead; everything is written as
float64, in which counts, ids and fp32 values are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from enum import IntEnum

import torch

from eellm.decoding.continuation import MAX_ALTERNATIVES, Token
from eellm.decoding.model.ragged import Span
from eellm.decoding.policy import Policy
from eellm.decoding.sampling import SamplingOptions
from eellm.model.spec import ModelSpec
from eellm.model.statistics import HeadStatistics


class Kind(IntEnum):
    """Of a message. `drain`: all stages meet when they have done everything before it; `end`: and follow no longer."""

    prefill = 0
    step = 1
    drain = 2
    end = 3


class State(IntEnum):
    """Of a sequence's newest token: its successor is known; exits are asked for it; only the final head is."""

    decided = 0
    asks = 1
    waits = 2


@dataclass
class Passenger:
    """One sequence in a message: its rows, and what it takes to choose the next token.

    `said`: for every exit that its policy has asked so far, the values of its `HeadStatistics` about the newest token.
    """

    span: Span
    state: State
    draw: float
    sampling: SamplingOptions
    policy: Policy
    alternatives: int = 0
    said: list[tuple[float, ...]] = field(default_factory=list)


@dataclass
class Message:
    """One forward of some sequences, or a command. `max_tokens` is the size of the first stage's KV cache.

    `hidden` [r, 1, h] are the rows of all passengers, one after the other, as they enter the stage.
    """

    kind: Kind
    passengers: list[Passenger] = field(default_factory=list)
    max_tokens: int = 0
    hidden: torch.Tensor | None = None

    @property
    def undecided(self) -> list[int]:
        """Places of the passengers whose next token is not known yet."""
        return [place for place, passenger in enumerate(self.passengers) if passenger.state != State.decided]

    @property
    def asking(self) -> list[int]:
        return [place for place, passenger in enumerate(self.passengers) if passenger.state == State.asks]

    @property
    def num_rows(self) -> int:
        return sum(passenger.span.count for passenger in self.passengers)


def written_statistics(statistics: HeadStatistics) -> list[tuple[float, ...]]:
    """One tuple of values per token."""
    columns = [getattr(statistics, name).double() for name in HeadStatistics.__dataclass_fields__]
    return [tuple(row) for row in torch.stack(columns, dim=1).tolist()]


def read_statistics(rows: Sequence[tuple[float, ...]], device: torch.device) -> HeadStatistics:
    prediction, *others = torch.tensor(rows, dtype=torch.float64, device=device).unbind(1)
    return HeadStatistics(prediction.long(), *(values.float() for values in others))


_HEAD = 3
"""Numbers about a message as a whole."""
_RIDE = 10
"""Numbers about a passenger, without its thresholds and what exits have said."""
_ANSWER = 5
"""Numbers about a token, without its alternatives."""
_SAID = len(HeadStatistics.__dataclass_fields__)


@dataclass(frozen=True)
class WireFormat:
    """What all stages agree on: sequences in a message at most; the decoder's policy, whose exits the others may ask."""

    spec: ModelSpec
    max_batch: int
    policy: Policy

    @property
    def num_exits(self) -> int:
        return len(self.policy.active)

    def message(self) -> torch.Tensor:
        """Room for a message without its rows."""
        return torch.zeros(_HEAD + self.max_batch * (_RIDE + self.num_exits * (1 + _SAID)), dtype=torch.float64)

    def write_message(self, message: Message) -> torch.Tensor:
        tensor = self.message()
        tensor[:_HEAD] = torch.tensor((message.kind, len(message.passengers), message.max_tokens))
        rides = tensor[_HEAD:].view(self.max_batch, -1)
        for ride, passenger in zip(rides, message.passengers, strict=False):
            values = [*astuple(passenger.span), passenger.state, passenger.draw, *astuple(passenger.sampling)]
            values += [passenger.alternatives, len(passenger.said), *self._written_thresholds(passenger.policy)]
            values += [value for said in passenger.said for value in said]
            ride[: len(values)] = torch.tensor(values, dtype=torch.float64)
        return tensor

    def read_message(self, tensor: torch.Tensor) -> Message:
        kind, count, max_tokens = map(int, tensor[:_HEAD].tolist())
        rides = tensor[_HEAD:].view(self.max_batch, -1)[:count].tolist()
        return Message(Kind(kind), [self._passenger(ride) for ride in rides], max_tokens)

    def answer(self) -> torch.Tensor:
        """Room for an answer."""
        return torch.zeros(self.max_batch, _ANSWER + 2 * MAX_ALTERNATIVES, dtype=torch.float64)

    def write_answer(self, tokens: Sequence[Token | None]) -> torch.Tensor:
        """The tokens that a stage has chosen for the passengers of a message; None where it has not."""
        tensor = self.answer()
        for row, token in zip(tensor, tokens, strict=False):
            if token is None:
                row[0] = -1
            else:
                values = [self.spec.heads.index(token.head), token.id, token.confidence, token.logprob, len(token.alternatives)]
                values += [value for alternative in token.alternatives for value in alternative]
                row[: len(values)] = torch.tensor(values, dtype=torch.float64)
        return tensor

    def read_answer(self, tensor: torch.Tensor, count: int) -> list[Token | None]:
        return [self._token(row) for row in tensor[:count].tolist()]

    def _token(self, row: list[float]) -> Token | None:
        head, id_, confidence, logprob, count = row[:_ANSWER]
        if head < 0:
            return None
        layers = [*self.spec.exit_layers, self.spec.num_layers]
        others = tuple((int(row[place]), row[place + 1]) for place in range(_ANSWER, _ANSWER + 2 * int(count), 2))
        return Token(int(id_), self.spec.heads[int(head)], layers[int(head)], confidence, logprob, None, others)

    def _written_thresholds(self, policy: Policy) -> list[float]:
        """One for each of the decoder's exits, NaN for those that the policy does not ask."""
        thresholds = dict(zip(policy.active, policy.thresholds, strict=True))
        return [thresholds.get(layer, math.nan) for layer in self.policy.active]

    def _passenger(self, ride: list[float]) -> Passenger:
        slot, start, count, state, draw, temperature, top_k, top_p, alternatives, num_said = ride[:_RIDE]
        first = _RIDE + self.num_exits
        asked = [pair for pair in zip(self.policy.active, ride[_RIDE:first], strict=True) if not math.isnan(pair[1])]
        active, thresholds = tuple(layer for layer, _ in asked), tuple(threshold for _, threshold in asked)
        policy = replace(self.policy, active=active, thresholds=thresholds)
        said = [tuple(ride[first + exit_ * _SAID : first + (exit_ + 1) * _SAID]) for exit_ in range(int(num_said))]
        sampling, span = SamplingOptions(temperature, int(top_k), top_p), Span(int(slot), int(start), int(count))
        return Passenger(span, State(int(state)), draw, sampling, policy, int(alternatives), said)
