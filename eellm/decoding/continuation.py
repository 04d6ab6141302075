"""A request for tokens, and the sequence that grows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from eellm.config.schema import DecodingConfig
from eellm.decoding.policy import Policy
from eellm.decoding.queue import SegmentQueue
from eellm.decoding.reading import Reading
from eellm.decoding.sampling import GREEDY, SamplingOptions, choose, most_probable, uniform

End = Literal["eos", "length", "stop"]

MAX_ALTERNATIVES = 20
"""Alternatives of a token that may be asked for."""


@dataclass(frozen=True)
class Token:
    """An emitted token. `head` spoke, after `exit_layer` layers.

    `confidence` is the largest probability under the head at its temperature, the measure of exit policies; `logprob`
    the token's log-probability under the head's own distribution, without any temperature, top-k or top-p. `drafted_by`
    names the exit whose draft the head has accepted. `alternatives`: the most probable (id, log-probability) there, as many as
    the request asks for.
    """

    id: int
    head: str
    exit_layer: int
    confidence: float
    logprob: float
    drafted_by: str | None = None
    alternatives: tuple[tuple[int, float], ...] = ()

    @classmethod
    def chosen(cls, reading: Reading, sampling: SamplingOptions, draw: float, alternatives: int = 0) -> Token:
        """What a head's reading of one token makes of a random number; the same on all tensor-parallel ranks."""
        id_, logprob = choose(reading, sampling, draw)
        others = most_probable(reading, alternatives)
        return cls(id_, reading.head, reading.layer, float(reading.statistics.probability), logprob, None, others)

    def as_row(self) -> dict[str, Any]:
        """For files; alternatives that nobody asked for are left out."""
        row = asdict(self)
        if not self.alternatives:
            del row["alternatives"]
        return row


@dataclass(frozen=True)
class Request:
    """What is wanted of one sequence. `eos_id` None: no token ends it. Draws depend on `seed` and position only.

    `policy`: of the decoder's kind, with some of its exits; None: the decoder's own. `alternatives`: at most
    `MAX_ALTERNATIVES`.
    """

    max_new_tokens: int
    sampling: SamplingOptions = GREEDY
    seed: int = 0
    eos_id: int | None = None
    policy: Policy | None = None
    alternatives: int = 0

    @classmethod
    def of(cls, config: DecodingConfig, seed: int, eos_id: int | None) -> Request:
        sampling = SamplingOptions(config.temperature, config.top_k, config.top_p)
        return cls(config.max_new_tokens, sampling, seed, eos_id if config.stop_at_eos else None)


_NO_EXITS = Policy("never", (), (), 0)


@dataclass(eq=False)
class Continuation:
    """A sequence on its way. `ids` holds the prompt and everything emitted; the last id has not entered the model yet.

    `policy` decides about its exits. `queue` is there from the first step that serves the sequence on. `stopped` may be set
    from outside: the sequence leaves with the next step.
    """

    request: Request
    prompt: Sequence[int]
    ids: list[int] = field(init=False)
    tokens: list[Token] = field(default_factory=list)
    stopped: bool = False
    policy: Policy = _NO_EXITS
    _queue: SegmentQueue | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a prompt needs at least one token")
        self.ids = list(self.prompt)

    @property
    def queue(self) -> SegmentQueue:
        assert self._queue is not None, "the sequence still waits for a slot"
        return self._queue

    @queue.setter
    def queue(self, queue: SegmentQueue) -> None:
        self._queue = queue

    @property
    def entered(self) -> bool:
        """The whole prompt has entered the model."""
        return len(self.queue) >= len(self.prompt)

    @property
    def max_tokens(self) -> int:
        """Tokens that enter the model at most; the last one never does."""
        return len(self.prompt) + self.request.max_new_tokens - 1

    @property
    def remaining(self) -> int:
        """Tokens that may still come."""
        return self.request.max_new_tokens - len(self.tokens)

    @property
    def end(self) -> End | None:
        """Why the sequence is over; None while it is not."""
        if self.stopped:
            return "stop"
        if self.tokens and self.ids[-1] == self.request.eos_id:
            return "eos"
        return "length" if self.remaining <= 0 else None

    def emit(self, token: Token) -> None:
        self.tokens.append(token)
        self.ids.append(token.id)

    @property
    def draw(self) -> float:
        """The random number of the next token."""
        return uniform(self.request.seed, len(self.ids))

    def emit_from(self, reading: Reading) -> Token:
        """Emit the token that a head's reading of the last one (a reading of one token) and the request make."""
        token = Token.chosen(reading, self.request.sampling, self.draw, self.request.alternatives)
        self.emit(token)
        return token

    def replace(self, place: int, token_id: int) -> None:
        """Go on as if the emitted token at `place` had been this one and none had followed: to follow a given text."""
        assert 0 <= place < len(self.tokens), "no such token has been emitted"
        del self.tokens[place + 1 :], self.ids[len(self.prompt) + place + 1 :]
        self.ids[-1] = token_id
        self.queue.truncate(len(self.ids) - 1)  # the last id enters with the next step
