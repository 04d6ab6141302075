"""Generating tokens: requests in, tokens with their exit layers out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from eellm.config.schema import DecodingConfig
from eellm.decoding.counters import Counters
from eellm.decoding.kv_cache import KVCache
from eellm.decoding.modes import CatchUp, Mode
from eellm.decoding.policy import Policy, never_exit
from eellm.decoding.queue import SegmentQueue
from eellm.decoding.sampling import GREEDY, SamplingOptions, choose, uniform
from eellm.decoding.segments import InferenceModel
from eellm.model.spec import ModelSpec
from eellm.model.stage import Stage


@dataclass(frozen=True)
class Token:
    """An emitted token. `head` spoke, after `exit_layer` layers.

    `confidence` is the largest probability under the head at its temperature, the measure of exit policies; `logprob`
    the token's log-probability under the head's own distribution, without any temperature, top-k or top-p.
    """

    id: int
    head: str
    exit_layer: int
    confidence: float
    logprob: float


@dataclass(frozen=True)
class DecoderOptions:
    """`max_pending`: tokens that may wait at exits before one must pass all layers; 0 = never exit, None = no bound."""

    mode: Literal["full", "catch_up"] = "catch_up"
    max_pending: int | None = None


CATCH_UP = DecoderOptions()


@dataclass(frozen=True)
class Request:
    """What is wanted of one sequence. `eos_id` None: no token ends it. Draws depend on `seed` and position only."""

    max_new_tokens: int
    sampling: SamplingOptions = GREEDY
    seed: int = 0
    eos_id: int | None = None

    @classmethod
    def of(cls, config: DecodingConfig, seed: int, eos_id: int | None) -> Request:
        sampling = SamplingOptions(config.temperature, config.top_k, config.top_p)
        return cls(config.max_new_tokens, sampling, seed, eos_id if config.stop_at_eos else None)


@dataclass
class _Sequence:
    """A request on its way. `ids` holds the prompt and everything emitted; the last id has not entered the model yet."""

    request: Request
    queue: SegmentQueue
    ids: list[int]
    prompt_length: int
    tokens: list[Token] = field(default_factory=list)

    @property
    def end(self) -> Literal["eos", "length"] | None:
        if self.tokens and self.ids[-1] == self.request.eos_id:
            return "eos"
        return "length" if len(self.tokens) >= self.request.max_new_tokens else None


class Decoder:
    """Decodes one sequence at a time with a stage that holds the whole model and is in evaluation mode.

    All tensor-parallel ranks make the same calls and get the same tokens. `prefill` and `steps` count what prompts and
    what the tokens after each first one have cost since the decoder was made.
    """

    def __init__(self, stage: Stage, policy: Policy, options: DecoderOptions = CATCH_UP):
        exits = options.mode != "full" and options.max_pending != 0
        self.policy = policy if exits else never_exit(stage.spec)
        self.options = options
        self.mode: Mode = CatchUp(InferenceModel(stage, self.policy.active), self.policy, options.max_pending)
        self.prefill, self.steps = Counters(), Counters()
        self._kv: KVCache | None = None
        self._sequence: _Sequence | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.mode.model.spec

    @property
    def sequence(self) -> _Sequence:
        if self._sequence is None:
            raise ValueError("no sequence: call start first")
        return self._sequence

    @property
    def end(self) -> Literal["eos", "length"] | None:
        """Why the sequence is over; None while it is not."""
        return self.sequence.end

    def start(self, prompt_ids: Sequence[int], request: Request) -> None:
        """Begin a sequence; the one before is dropped. The first `step` takes the prompt through the model."""
        if not prompt_ids:
            raise ValueError("a prompt needs at least one token")
        kv = self._cache(len(prompt_ids) + request.max_new_tokens - 1)  # the last token never enters the model
        self._sequence = _Sequence(request, SegmentQueue(self.mode.model, kv), list(prompt_ids), len(prompt_ids))

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """The next token of every running sequence: none when it is over. The first comes from the final head."""
        sequence = self.sequence
        if sequence.end is not None:
            return []
        queue, generated = sequence.queue, len(sequence.tokens)
        queue.counters = self.steps if generated else self.prefill
        if generated:
            reading = self.mode.advance(queue, sequence.ids[-1], generated)
        else:
            reading = self.mode.prefill(queue, sequence.ids)
        draw = uniform(sequence.request.seed, len(sequence.ids))
        id_, logprob = choose(reading, sequence.request.sampling, draw)
        token = Token(id_, reading.head, reading.layer, float(reading.statistics.probability), logprob)
        queue.counters.tokens += 1
        sequence.tokens.append(token)
        sequence.ids.append(id_)
        return [token]

    def replace_last(self, token_id: int) -> None:
        """Go on as if the last token had been this one: to follow a given text."""
        assert self.sequence.tokens, "no token has been emitted"
        self.sequence.ids[-1] = token_id

    @torch.inference_mode()
    def drain(self) -> None:
        """Take all pending tokens through the whole model, so that the KV cache is complete."""
        self.sequence.queue.drain()

    def generate(self, prompt_ids: Sequence[int], request: Request) -> Iterator[Token]:
        """Tokens until the request ends. The decoder serves no other sequence meanwhile."""
        self.start(prompt_ids, request)
        while tokens := self.step():
            yield from tokens

    def _cache(self, max_tokens: int) -> KVCache:
        if self._kv is None or self._kv.shape.max_tokens < max_tokens:
            self._kv = self.mode.model.cache(max_tokens)
        self._kv.truncate(0)
        return self._kv
