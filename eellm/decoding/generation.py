"""From prompt to text: stop strings, and the record that goes into generations.jsonl."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from eellm.config.schema import DecodingConfig
from eellm.data.text_stream import TextStream
from eellm.data.tokenizer import Tokenizer
from eellm.decoding.decoder import Decoder, Request, Token

StopReason = Literal["eos", "length", "stop"]


class Stops:
    """Looks for stop strings in text that arrives in pieces."""

    def __init__(self, stops: list[str]):
        self.text = ""
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)

    def add(self, piece: str) -> int | None:
        """Where in `text` the earliest stop string begins, or None to go on."""
        # one that was not there before ends within the new piece
        start = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        found = [place for place in (self.text.find(stop, start) for stop in self._stops) if place >= 0]
        return min(found, default=None)


@dataclass(frozen=True)
class Generation:
    """A prompt's continuation. `text` ends before a stop string; `tokens` and `pieces` (each token's text) are all there.

    `threshold` is the exit policy's, one number or one per active exit; None where nothing exits by a threshold.
    """

    prompt: str
    text: str
    tokens: list[Token]
    pieces: list[str]
    stop_reason: StopReason
    seconds: float
    decoding: str
    threshold: float | list[float] | None

    def as_row(self) -> dict[str, Any]:
        """One object of generations.jsonl."""
        tokens = [{"text": piece, **asdict(token)} for piece, token in zip(self.pieces, self.tokens, strict=True)]
        return {
            "prompt": self.prompt,
            "text": self.text,
            "decoding": self.decoding,
            "threshold": self.threshold,
            "tokens": tokens,
            "stop_reason": self.stop_reason,
            "seconds": self.seconds,
        }


def generate_text(decoder: Decoder, tokenizer: Tokenizer, prompt: str, decoding: DecodingConfig, seed: int) -> Generation:
    """Continue a prompt until a stop string, the end-of-document token or `max_new_tokens`.

    An empty prompt starts a document. The mode and `max_pending` are the decoder's, whatever `decoding` says.
    """
    started = time.perf_counter()
    stream, stops = TextStream(tokenizer), Stops(decoding.stop)
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eod_id]
    for id_ in prompt_ids:  # what a token looks like may depend on the ones before
        stream.add(id_)
    tokens: list[Token] = []
    pieces: list[str] = []
    cut = None
    for token in decoder.generate(prompt_ids, Request.of(decoding, seed, tokenizer.eod_id)):
        tokens.append(token)
        pieces.append(stream.add(token.id))
        cut = stops.add(pieces[-1])
        if cut is not None:
            break
    else:
        pieces[-1] += stream.finish()
    return Generation(
        prompt=prompt,
        text="".join(pieces)[:cut],
        tokens=tokens,
        pieces=pieces,
        stop_reason="stop" if cut is not None else decoder.end or "length",
        seconds=time.perf_counter() - started,
        decoding=decoder.options.mode,
        threshold=decoder.policy.threshold,
    )
