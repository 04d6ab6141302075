"""What a client reads: OpenAI's objects, with `tokens` in every choice: which exit said each token, and how sure it was."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eellm.data.tokenizer import Tokenizer
from eellm.serving.job import Finish, Job, Piece, Said

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


def token_row(said: Said) -> dict[str, Any]:
    """eellm's own account of a token."""
    token = said.token
    row = {"text": said.text, "id": token.id, "exit_layer": token.exit_layer, "head": token.head}
    row |= {"confidence": token.confidence, "logprob": token.logprob}
    return row | ({"drafted_by": token.drafted_by} if token.drafted_by else {})


@dataclass
class Form:
    """How one request is answered: as a chat or as a completion, whole or in chunks."""

    model: str
    tokenizer: Tokenizer
    chat: bool
    logprobs: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self._offsets: dict[int, int] = {}

    def answer(self, jobs: Sequence[Job], heard: Sequence[Sequence[Piece]], ends: Sequence[Finish]) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, (pieces, end) in enumerate(zip(heard, ends, strict=True)):
            text, said = "".join(piece.text for piece in pieces), [said for piece in pieces for said in piece.said]
            content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append(self._choice(index, content, said, FINISH[end.reason]))
        kind = "chat.completion" if self.chat else "text_completion"
        return self._envelope(kind, choices) | {"usage": usage(jobs, ends)}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        content = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        return self._chunk([self._choice(index, content, piece.said, None)])

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Of a chat: who speaks."""
        return self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, [], None)])

    def last_chunk(self, index: int, end: Finish) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._chunk([self._choice(index, content, [], FINISH[end.reason])])

    def usage_chunk(self, jobs: Sequence[Job], ends: Sequence[Finish]) -> dict[str, Any]:
        return self._chunk([]) | {"usage": usage(jobs, ends)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", choices)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(self, index: int, content: dict[str, Any], said: Sequence[Said], finish: str | None) -> dict[str, Any]:
        logprobs = None
        if self.logprobs:
            logprobs = {"content": self._chat_logprobs(said), "refusal": None} if self.chat else self._logprobs(index, said)
        rows = [token_row(one) for one in said]
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish, "tokens": rows}

    def _chat_logprobs(self, said: Sequence[Said]) -> list[dict[str, Any]]:
        return [
            {
                **self._entry(one.token.id, one.token.logprob),
                "top_logprobs": [self._entry(id_, logprob) for id_, logprob in one.token.alternatives],
            }
            for one in said
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        table = self.tokenizer.token_bytes
        spelled = self.tokenizer.spelled(token)
        content = spelled.encode() if table is None else table[token] if token < len(table) else b""
        return {"token": spelled, "logprob": logprob, "bytes": list(content)}

    def _logprobs(self, index: int, said: Sequence[Said]) -> dict[str, Any]:
        offsets = []
        for one in said:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(one.text)
        return {
            "tokens": [self.tokenizer.spelled(one.token.id) for one in said],
            "token_logprobs": [one.token.logprob for one in said],
            "top_logprobs": [{self.tokenizer.spelled(id_): logprob for id_, logprob in one.token.alternatives} for one in said],
            "text_offset": offsets,
        }


def usage(jobs: Sequence[Job], ends: Sequence[Finish]) -> dict[str, int]:
    """A prompt counts once, however many continuations it has; tokens of a stop string count too."""
    prompts = sum(len(ids) for ids in {id(job.ids): job.ids for job in jobs}.values())
    tokens = sum(end.tokens for end in ends)
    return {"prompt_tokens": prompts, "completion_tokens": tokens, "total_tokens": prompts + tokens}
