"""What a server offers, and how a request becomes jobs within that."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eellm.config.schema import DecodingConfig, DecodingMode, ServeConfig
from eellm.data.tokenizer import Tokenizer
from eellm.decoding.continuation import Request
from eellm.decoding.policy import Policy, never_exit
from eellm.decoding.sampling import SamplingOptions
from eellm.model.spec import ModelSpec
from eellm.serving.chat import ChatTemplate, no_chat_template
from eellm.serving.errors import ApiError, wrong
from eellm.serving.job import Event, Job
from eellm.serving.schema import ChatRequest, CompletionRequest, Generation


@dataclass(frozen=True)
class Offer:
    """`policy` is what a request gets that does not say; requests choose among its exits. `context`: tokens of a sequence."""

    name: str
    spec: ModelSpec
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    policy: Policy
    modes: tuple[DecodingMode, ...]
    decoding: DecodingConfig
    limits: ServeConfig
    context: int
    created: int

    @property
    def max_prompt_tokens(self) -> int:
        return min(self.limits.max_prompt_tokens or self.context, self.context - 1)

    def model_card(self) -> dict[str, Any]:
        """The entry of /v1/models, with what a client can choose."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "eellm",
            "num_layers": self.spec.num_layers,
            "exit_layers": list(self.policy.active),
            "exit_policy": self.policy.kind,
            "exit_threshold": self.policy.threshold,
            "decodings": list(self.modes),
            "default_decoding": self.decoding.mode,
            "chat": self.chat is not None,
            "context_tokens": self.context,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_tokens": self.limits.max_new_tokens,
            "max_choices": self.limits.max_choices,
        }

    def jobs(
        self, asked: CompletionRequest | ChatRequest, client: str, listener: Callable[[int], Callable[[Event], None]]
    ) -> list[Job]:
        """One job for each choice of the answer; `listener(index)` hears of it. Raises ApiError for what is not offered."""
        if asked.model is not None and asked.model != self.name:
            raise ApiError(404, f"model: there is no {asked.model[:100]!r} here, only {self.name!r}.", "model", "model_not_found")
        if isinstance(asked, ChatRequest):
            prompts, eos_id = [self._chat_prompt(asked)], self.chat.eos_id if self.chat else 0
        else:
            prompts, eos_id = self._prompts(asked), self.tokenizer.eod_id
        mode, policy, sampling = self._mode(asked), self._policy(asked), self._sampling(asked)
        max_tokens, count = self._max_tokens(asked, max(map(len, prompts))), asked.n or 1
        if len(prompts) * count > self.limits.max_choices:
            field = "n" if count > 1 else "prompt"
            raise wrong(field, f"makes {len(prompts) * count} sequences, and a request may have {self.limits.max_choices}.")
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        deadline = time.monotonic() + self.limits.request_timeout
        jobs = []
        for index in range(len(prompts) * count):
            eos = eos_id if self.decoding.stop_at_eos else None
            request = Request(max_tokens, sampling, seed + index % count, eos, policy, asked.alternatives)
            jobs.append(Job(mode, prompts[index // count], request, asked.stops, client, deadline, listener(index)))
        return jobs

    def _prompts(self, asked: CompletionRequest) -> list[list[int]]:
        given = asked.prompt
        parts: list[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        if len(parts) > self.limits.max_choices:
            raise wrong("prompt", f"holds {len(parts)} prompts, and a request may have {self.limits.max_choices}.")
        prompts = [self.tokenizer.encode_prompt(part) if isinstance(part, str) else part for part in parts]
        for ids in prompts:
            self._check_length("prompt", ids)
            if any(id_ >= self.spec.vocab_size for id_ in ids):
                raise wrong("prompt", f"holds a token id beyond the vocabulary of {self.spec.vocab_size}.")
        return [ids or [self.tokenizer.eod_id] for ids in prompts]

    def _chat_prompt(self, asked: ChatRequest) -> list[int]:
        if self.chat is None:
            raise no_chat_template()
        ids = self.chat.encode(asked.messages)
        self._check_length("messages", ids)
        return ids or [self.tokenizer.eod_id]

    def _check_length(self, field: str, ids: list[int]) -> None:
        if len(ids) > self.max_prompt_tokens:
            message = f"{field}: {len(ids)} tokens, and {self.max_prompt_tokens} are allowed."
            raise ApiError(400, message, field, "context_length_exceeded")

    def _max_tokens(self, asked: CompletionRequest | ChatRequest, prompt: int) -> int:
        field, given = "max_tokens", asked.max_tokens
        if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
            field, given = "max_completion_tokens", asked.max_completion_tokens
        if given is None:
            return min(self.decoding.max_new_tokens, self.context - prompt)
        if given > self.limits.max_new_tokens:
            raise wrong(field, f"{given} tokens, and a request may have {self.limits.max_new_tokens}.")
        if prompt + given > self.context:
            message = (
                f"{field}: {prompt} tokens of the prompt and {given} new ones are more than the {self.context} of a sequence."
            )
            raise ApiError(400, message, field, "context_length_exceeded")
        return given

    def _mode(self, asked: Generation) -> DecodingMode:
        mode = asked.decoding or self.decoding.mode
        if mode not in self.modes:
            raise wrong("decoding", f"{mode} is not offered; choose from {', '.join(self.modes)}.")
        return mode

    def _sampling(self, asked: Generation) -> SamplingOptions:
        default = self.decoding
        temperature = default.temperature if asked.temperature is None else asked.temperature
        top_k = default.top_k if asked.top_k is None else asked.top_k
        return SamplingOptions(temperature, min(top_k, self.spec.vocab_size), asked.top_p or default.top_p)

    def _policy(self, asked: Generation) -> Policy:
        """The server's, with the exits and thresholds that the request names."""
        if self._mode(asked) == "full":
            for field in ("exit_threshold", "exit_layers"):
                if getattr(asked, field) is not None:
                    raise wrong(field, "decoding=full takes no exits.")
            return never_exit(self.spec)
        own = self.policy
        layers = tuple(own.active if asked.exit_layers is None else asked.exit_layers)
        if set(layers) - set(own.active) or list(layers) != sorted(set(layers)):
            raise wrong("exit_layers", f"choose from {list(own.active)}, each once and in this order.")
        thresholds = dict(zip(own.active, own.thresholds, strict=True))
        given = asked.exit_threshold
        if given is None:
            return Policy(own.kind, layers, tuple(thresholds[layer] for layer in layers), own.vocab_size, own.min_new_tokens)
        values = tuple(map(float, given)) if isinstance(given, list) else (float(given),) * len(layers)
        if len(values) != len(layers):
            raise wrong(
                "exit_threshold", f"{len(values)} for the {len(layers)} exits {list(layers)}: give one for all, or one each."
            )
        for value in values:
            self._check_threshold(value)
        return Policy(own.kind, layers, values, own.vocab_size, own.min_new_tokens)

    def _check_threshold(self, value: float) -> None:
        if self.policy.kind in ("fixed_layer", "never"):
            raise wrong("exit_threshold", f"the server's exit policy, {self.policy.kind}, has no threshold.")
        if self.policy.kind == "patience":
            if value < 1 or value != math.floor(value):
                raise wrong("exit_threshold", "patience counts exits that agree: give a whole number, at least 1.")
        elif not 0.0 <= value <= 1.0:
            raise wrong("exit_threshold", f"a {self.policy.kind} lies in 0..1.")
