"""What the stages of a pipeline tell each other while they decode, and how it is written down.

A message goes from stage to stage: whose rows come, what has been said about them, and then the rows. An answer goes from a
stage straight back to the first one. Both have a fixed size, so that no size is sent ahead; everything is written as
float64, in which counts, ids and fp32 values are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from enum import IntEnum

import torch

from eellm.decoding.continuation import Token
from eellm.decoding.ragged import Span
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

    `said`: for every active exit passed so far, the values of its `HeadStatistics` about the newest token.
    """

    span: Span
    state: State
    draw: float
    sampling: SamplingOptions
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
_RIDE = 9
"""Numbers about a passenger, without what exits have said."""
_ANSWER = 4
_SAID = len(HeadStatistics.__dataclass_fields__)


@dataclass(frozen=True)
class WireFormat:
    """Sizes that all stages agree on: sequences in a message at most, active exits of the whole model."""

    spec: ModelSpec
    max_batch: int
    num_exits: int

    def message(self) -> torch.Tensor:
        """Room for a message without its rows."""
        return torch.zeros(_HEAD + self.max_batch * (_RIDE + self.num_exits * _SAID), dtype=torch.float64)

    def write_message(self, message: Message) -> torch.Tensor:
        tensor = self.message()
        tensor[:_HEAD] = torch.tensor((message.kind, len(message.passengers), message.max_tokens))
        rides = tensor[_HEAD:].view(self.max_batch, -1)
        for ride, passenger in zip(rides, message.passengers, strict=False):
            values = [*astuple(passenger.span), passenger.state, passenger.draw, *astuple(passenger.sampling)]
            values += [len(passenger.said), *(value for said in passenger.said for value in said)]
            ride[: len(values)] = torch.tensor(values, dtype=torch.float64)
        return tensor

    def read_message(self, tensor: torch.Tensor) -> Message:
        kind, count, max_tokens = map(int, tensor[:_HEAD].tolist())
        rides = tensor[_HEAD:].view(self.max_batch, -1)[:count].tolist()
        return Message(Kind(kind), [_passenger(ride) for ride in rides], max_tokens)

    def answer(self) -> torch.Tensor:
        """Room for an answer."""
        return torch.zeros(self.max_batch, _ANSWER, dtype=torch.float64)

    def write_answer(self, tokens: Sequence[Token | None]) -> torch.Tensor:
        """The tokens that a stage has chosen for the passengers of a message; None where it has not."""
        tensor = self.answer()
        for row, token in zip(tensor, tokens, strict=False):
            if token is None:
                row[0] = -1
            else:
                values = (self.spec.heads.index(token.head), token.id, token.confidence, token.logprob)
                row[:] = torch.tensor(values, dtype=torch.float64)
        return tensor

    def read_answer(self, tensor: torch.Tensor, count: int) -> list[Token | None]:
        return [self._token(row) for row in tensor[:count].tolist()]

    def _token(self, row: list[float]) -> Token | None:
        head, id_, confidence, logprob = row
        if head < 0:
            return None
        layers = [*self.spec.exit_layers, self.spec.num_layers]
        return Token(int(id_), self.spec.heads[int(head)], layers[int(head)], confidence, logprob)


def _passenger(ride: list[float]) -> Passenger:
    slot, start, count, state, draw, temperature, top_k, top_p, num_said = ride[:_RIDE]
    said = [tuple(ride[_RIDE + exit_ * _SAID : _RIDE + (exit_ + 1) * _SAID]) for exit_ in range(int(num_said))]
    sampling = SamplingOptions(temperature, int(top_k), top_p)
    return Passenger(Span(int(slot), int(start), int(count)), State(int(state)), draw, sampling, said)
