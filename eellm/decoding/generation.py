"""From prompt to text: stop strings, and the record that goes into generations.jsonl."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eellm.config.schema import DecodingConfig
from eellm.data.text_stream import TextStream
from eellm.data.tokenizer import Tokenizer
from eellm.decoding.continuation import Continuation, End, Request, Token
from eellm.decoding.decoder import Decoder


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

    @property
    def settled(self) -> int:
        """Characters of `text` that no stop string can begin in any more."""
        for start in range(max(0, len(self.text) - self._longest + 1), len(self.text)):
            if any(stop.startswith(self.text[start:]) for stop in self._stops):
                return start
        return len(self.text)


class ContinuedText:
    """The text of a prompt's continuation, token by token, up to a stop string.

    `pieces`: what each token has added. `cut`: where in the text a stop string begins; None where there is none so far.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: list[str]):
        self.pieces: list[str] = []
        self.cut: int | None = None
        self._stream, self._stops = TextStream(tokenizer), Stops(stops)
        for id_ in prompt_ids:  # what a token looks like may depend on the ones before
            self._stream.add(id_)

    def add(self, token: Token, last: bool) -> None:
        """The next token; those behind a stop string are not wanted any more."""
        if self.cut is not None:
            return
        self.pieces.append(self._stream.add(token.id) + (self._stream.finish() if last else ""))
        self.cut = self._stops.add(self.pieces[-1])

    @property
    def text(self) -> str:
        return self._stops.text[: self.cut]

    @property
    def settled(self) -> int:
        """Characters of `text` that stay, whatever follows."""
        return self._stops.settled if self.cut is None else self.cut


@dataclass(frozen=True)
class Generation:
    """A prompt's continuation. `text` ends before a stop string; `tokens` and `pieces` (each token's text) are all there.

    `threshold` is the exit policy's, one number or one per active exit; None where nothing exits by a threshold.
    """

    prompt: str
    text: str
    tokens: list[Token]
    pieces: list[str]
    stop_reason: End
    seconds: float
    decoding: str
    threshold: float | list[float] | None

    def as_row(self) -> dict[str, Any]:
        """One object of generations.jsonl."""
        tokens = [{"text": piece, **token.as_row()} for piece, token in zip(self.pieces, self.tokens, strict=True)]
        return {
            "prompt": self.prompt,
            "text": self.text,
            "decoding": self.decoding,
            "threshold": self.threshold,
            "tokens": tokens,
            "stop_reason": self.stop_reason,
            "seconds": self.seconds,
        }


@dataclass
class _Text:
    """A prompt's text on its way."""

    prompt: str
    sequence: Continuation
    continued: ContinuedText
    started: float = 0.0
    seconds: float = 0.0

    def add(self, token: Token, last: bool) -> None:
        self.continued.add(token, last)
        if self.continued.cut is not None:
            self.sequence.stopped = True

    def finished(self, decoder: Decoder) -> Generation:
        assert self.sequence.end is not None
        return Generation(
            prompt=self.prompt,
            text=self.continued.text,
            tokens=self.sequence.tokens[: len(self.continued.pieces)],
            pieces=self.continued.pieces,
            stop_reason=self.sequence.end,
            seconds=self.seconds,
            decoding=decoder.options.mode,
            threshold=decoder.policy.threshold,
        )


def generate_texts(
    decoder: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], decoding: DecodingConfig, seed: int
) -> list[Generation]:
    """Continue prompts until a stop string, the end-of-document token or `max_new_tokens`; prompt n has seed `seed` + n.

    They run side by side, as many as the decoder takes; a generation's seconds run from the step that admits it. An empty
    prompt starts a document. Mode, `max_pending` and sizes are the decoder's, whatever `decoding` says.
    """
    encoded = [(prompt, tokenizer.encode_prompt(prompt) or [tokenizer.eod_id]) for prompt in prompts]
    return generate_from_ids(decoder, tokenizer, encoded, decoding, seed)


def generate_from_ids(
    decoder: Decoder, tokenizer: Tokenizer, prompts: Sequence[tuple[str, list[int]]], decoding: DecodingConfig, seed: int
) -> list[Generation]:
    """`generate_texts` for prompts that are encoded already: (text, ids)."""
    texts: dict[Continuation, _Text] = {}
    for number, (prompt, ids) in enumerate(prompts):
        sequence = decoder.submit(ids, Request.of(decoding, seed + number, tokenizer.eod_id))
        texts[sequence] = _Text(prompt, sequence, ContinuedText(tokenizer, ids, decoding.stop))
    while True:
        started = time.perf_counter()
        emitted = decoder.step()
        if not emitted:
            break
        for sequence in decoder.running:  # a first token may come later than the step that admits
            texts[sequence].started = texts[sequence].started or started
        for sequence, token in emitted:
            text = texts[sequence]
            text.add(token, last=sequence.end is not None and token is sequence.tokens[-1])
            text.seconds = time.perf_counter() - text.started
    return [text.finished(decoder) for text in texts.values()]
