"""One sequence of a request on its way through the engine, and what is heard of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from eellm.config.schema import DecodingMode
from eellm.data.tokenizer import Tokenizer
from eellm.decoding.continuation import End, Request, Token
from eellm.decoding.generation import ContinuedText
from eellm.serving.errors import ApiError


@dataclass(frozen=True)
class Said:
    """A token and the text that it adds."""

    token: Token
    text: str


@dataclass(frozen=True)
class Piece:
    """Text that stays whatever follows, and the tokens that it completes."""

    text: str
    said: list[Said]


@dataclass(frozen=True)
class Finish:
    """The sequence is over after so many tokens, those of a stop string included."""

    reason: End
    tokens: int


Event = Piece | Finish | ApiError
_NUMBERS = itertools.count()


@dataclass(eq=False)
class Job:
    """A prompt's continuation. `deliver` is called in the engine's thread; the last event is a Finish or an ApiError.

    `client` says whose share of the slots it takes. `cancelled` may be set from any thread: nobody listens any more.
    """

    mode: DecodingMode
    ids: list[int]
    request: Request
    stops: list[str]
    client: str
    deadline: float
    deliver: Callable[[Event], None]
    cancelled: bool = False
    over: bool = False
    number: int = field(default_factory=_NUMBERS.__next__)
    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    _text: ContinuedText | None = None
    _held: list[tuple[Token, int, int]] = field(default_factory=list)
    _length: int = 0
    _given: int = 0

    def begin(self, tokenizer: Tokenizer) -> None:
        self.admitted = time.monotonic()
        self._text = ContinuedText(tokenizer, self.ids, self.stops)

    def add(self, token: Token, end: End | None) -> None:
        """The next token, `end` where it is the last one; tells what can be told by now."""
        text = self._text
        assert text is not None
        if self.over:
            return
        self.first_token = self.first_token or time.monotonic()
        text.add(token, last=end is not None)
        start, self._length = self._length, self._length + len(text.pieces[-1])
        self._held.append((token, start, self._length))
        if text.cut is not None:
            end = "stop"
        self._tell(text, everything=end is not None)
        if end is not None:
            self.finish(Finish(end, len(text.pieces)))

    def finish(self, event: Finish | ApiError) -> None:
        if not self.over:
            self.over = True
            self.deliver(event)

    def _tell(self, continued: ContinuedText, everything: bool) -> None:
        """Text that stays, and the tokens whose text that completes; nothing of a stop string."""
        text = continued.text
        upto = len(text) if everything else continued.settled
        ready = [held for held in self._held if everything or held[2] <= upto]
        self._held = self._held[len(ready) :]
        if continued.cut is not None:
            ready = [held for held in ready if held[1] < continued.cut]
        if ready or upto > self._given:
            self.deliver(Piece(text[self._given : upto], [Said(token, text[start:end]) for token, start, end in ready]))
        self._given = upto

    @property
    def generated(self) -> int:
        """Tokens so far."""
        return 0 if self._text is None else len(self._text.pieces)
