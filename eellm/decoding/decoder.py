"""Generating tokens: requests in, tokens with their exit layers out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from eellm.config.schema import DecodingConfig, DecodingMode
from eellm.decoding.continuation import Continuation, Request, Token
from eellm.decoding.counters import Counters
from eellm.decoding.model.kv_cache import KVCache
from eellm.decoding.model.memory import check_fits
from eellm.decoding.model.segments import InferenceModel
from eellm.decoding.modes import CatchUp, Emitted, Mode, RecomputeKV
from eellm.decoding.pipeline.links import Links
from eellm.decoding.pipeline.messages import WireFormat
from eellm.decoding.pipeline.mode import Pipelined
from eellm.decoding.policy import Policy, never_exit
from eellm.decoding.queue import SegmentQueue, SegmentRunner
from eellm.decoding.speculative import SelfSpeculative, drafting
from eellm.errors import ConfigError, Problem
from eellm.mcore.groups import Groups
from eellm.model.spec import ModelSpec
from eellm.model.stage import Stage


@dataclass(frozen=True)
class DecoderOptions:
    """`max_pending`: tokens that may wait at exits before one must pass all layers; 0 = never exit, None = no bound.

    `draft_length`: tokens that exits draft before the full model verifies them. `max_batch` sequences run at a time, each
    of at most `max_tokens`, prompt included; None: as many as the requests at hand ask for. `prefill_chunk`: tokens of prompts
    that one step takes, so that a long prompt does not hold up the other sequences; None: all. On several stages the mode is
    `pipeline`, or `full`: the same without exits. `compile`: see `eellm.decoding.model.compiled_steps`.
    """

    mode: DecodingMode = "catch_up"
    max_pending: int | None = None
    draft_length: int | Literal["auto"] = "auto"
    max_batch: int = 1
    max_tokens: int | None = None
    compile: bool = False
    prefill_chunk: int | None = None

    @classmethod
    def of(cls, config: DecodingConfig) -> DecoderOptions:
        bounds = (config.max_pending, config.draft_length, config.max_batch, config.max_tokens)
        return cls(config.mode, *bounds, config.compile)


CATCH_UP = DecoderOptions()


class Decoder:
    """Decodes many sequences at a time with a stage in evaluation mode that holds the whole model, or the first of several.

    A sequence enters, leaves and exits on its own; what it is given does not depend on the others. All tensor-parallel
    ranks make the same calls and get the same tokens. `prefill` and `steps` count what prompts and what the tokens after
    each first one have cost this rank since the decoder was made. Of several stages the later ones run a
    `eellm.decoding.pipeline.follower.Follower` until `close`; `groups` say who they are.
    """

    def __init__(self, stage: Stage, policy: Policy, options: DecoderOptions = CATCH_UP, groups: Groups | None = None):
        assert stage.pre_process, "later stages follow"
        self.options = options
        self.policy = effective_policy(policy, options, stage.spec)
        self.runner = SegmentRunner(InferenceModel(stage, self.policy.active), options.compile)
        self.mode = _mode(self.runner, self.policy, options, groups)
        self.prefill, self.steps = Counters(), Counters()
        self.running: list[Continuation] = []
        self._waiting: deque[Continuation] = deque()
        self._kv: KVCache | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def model(self) -> InferenceModel:
        return self.runner.model

    def submit(self, prompt_ids: Sequence[int], request: Request) -> Continuation:
        """Ask for a continuation; it starts with the step that finds room for it.

        Raises ConfigError where it is longer than the model's positions or the cache.
        """
        sequence = Continuation(request, prompt_ids, policy=self._policy_of(request))
        self._check_length(sequence)
        self._waiting.append(sequence)
        return sequence

    def start(self, prompt_ids: Sequence[int], request: Request) -> Continuation:
        """Begin a sequence and drop all others."""
        for sequence in self.running:
            sequence.stopped = sequence.stopped or sequence.end is None
        self.running.clear()
        self._waiting.clear()
        return self.submit(prompt_ids, request)

    @torch.inference_mode()
    def step(self) -> Emitted:
        """Next tokens of the sequences that there is room for; none when all are over, or while prompts pass in chunks.

        With the whole model on one stage every sequence whose prompt has passed gets one or more, over several stages those
        whose tokens have come. A sequence's first token is the final head's.
        """
        self.running = [sequence for sequence in self.running if sequence.end is None]
        veterans, emitted = [sequence for sequence in self.running if sequence.entered], []
        self._admit()
        prompts = [sequence for sequence in self.running if not sequence.entered]
        if prompts:
            self.runner.counters = self.prefill
            ends = _chunks(prompts, self.options.prefill_chunk)
            emitted += self.mode.prefill(list(ends), list(ends.values()))
        on_their_way = any(sequence.entered for sequence in prompts) and not emitted
        if veterans or on_their_way:
            self.runner.counters = self.steps
            emitted += self.mode.advance(veterans)
        first = sum(token is sequence.tokens[0] for sequence, token in emitted)
        self.prefill.tokens += first
        self.steps.tokens += len(emitted) - first
        return emitted

    @torch.inference_mode()
    def reserve(self) -> None:
        """Take the memory for keys and values now. Raises ConfigError where there is not enough."""
        assert self.options.max_tokens is not None, "what requests will need is not known"
        self._take_memory(self.options.max_tokens)

    @torch.inference_mode()
    def drain(self) -> None:
        """Take all pending tokens through the whole model, so that the KV cache is complete."""
        self.mode.drain(self.running)

    @torch.inference_mode()
    def close(self) -> None:
        """There is nothing more to decode: later stages end."""
        self.mode.close()

    def generate(self, prompt_ids: Sequence[int], request: Request) -> Iterator[Token]:
        """Tokens of one sequence until it ends. The decoder serves no other meanwhile."""
        sequence = self.start(prompt_ids, request)
        while sequence.end is None:
            yield from [token for _, token in self.step()]

    @property
    def idle(self) -> bool:
        """There is nothing to do."""
        return not self._waiting and all(sequence.end is not None for sequence in self.running)

    def _policy_of(self, request: Request) -> Policy:
        if request.policy is None:
            return self.policy
        policy = effective_policy(request.policy, self.options, self.spec)
        assert set(policy.active) <= set(self.policy.active), "the model is cut at the decoder's exits"
        return policy

    def _admit(self) -> None:
        """Give free slots to the requests that have waited longest."""
        if not self.running and self._waiting:
            self._make_room()
        free = sorted(set(range(self.options.max_batch)) - {sequence.queue.slot for sequence in self.running})
        while free and self._waiting and self._kv is not None and self._waiting[0].max_tokens <= self._kv.shape.max_tokens:
            sequence = self._waiting.popleft()
            sequence.queue = SegmentQueue(self.model, self._kv, free.pop(0))
            self.running.append(sequence)

    def _make_room(self) -> None:
        """A cache for the requests that wait, unless there is one."""
        self._take_memory(self.options.max_tokens or max(sequence.max_tokens for sequence in self._waiting))

    def _take_memory(self, tokens: int) -> None:
        if self._kv is None or self._kv.shape.max_tokens < tokens:
            self._kv = None
            self.runner.forget()
            check_fits(self.model, tokens, self.options.max_batch)
            self._kv = self.model.cache(tokens, self.options.max_batch)

    def _check_length(self, sequence: Continuation) -> None:
        tokens, spec, problem = sequence.max_tokens, self.spec, None
        asked = f"prompt and new tokens make {tokens}"
        if spec.position == "learned" and tokens > spec.max_positions:
            reason, fix = f"the model has learned {spec.max_positions} positions", "fewer new tokens or a shorter prompt"
            problem = Problem("decoding.max_new_tokens", sequence.request.max_new_tokens, f"{asked}, and {reason}", fix)
        elif self.options.max_tokens is not None and tokens > self.options.max_tokens:
            problem = Problem("decoding.max_tokens", self.options.max_tokens, asked, f"decoding.max_tokens={tokens} or more")
        if problem is not None:
            raise ConfigError([problem])


def _chunks(prompts: Sequence[Continuation], budget: int | None) -> dict[Continuation, int]:
    """Which prompts go on now, up to which token: `budget` tokens in equal shares, what is left over to the oldest."""
    if budget is None:
        return {sequence: len(sequence.prompt) for sequence in prompts}
    left = [len(sequence.prompt) - len(sequence.queue) for sequence in prompts]
    taken = [min(tokens, budget // len(prompts)) for tokens in left]
    for number, tokens in enumerate(left):
        taken[number] += min(tokens - taken[number], budget - sum(taken))
    return {sequence: len(sequence.queue) + tokens for sequence, tokens in zip(prompts, taken, strict=True) if tokens}


def effective_policy(policy: Policy, options: DecoderOptions, spec: ModelSpec) -> Policy:
    """What the options leave of a policy."""
    if options.mode == "self_speculative":
        policy = drafting(policy, spec)
        return never_exit(spec) if options.draft_length == 0 else policy
    return never_exit(spec) if options.mode == "full" or options.max_pending == 0 else policy


def links_between(groups: Groups, model: InferenceModel, policy: Policy, options: DecoderOptions) -> Links:
    """This stage's connections; all ranks of the groups make them."""
    return Links(groups, WireFormat(model.spec, options.max_batch, policy), model.dtype)


def _mode(runner: SegmentRunner, policy: Policy, options: DecoderOptions, groups: Groups | None) -> Mode:
    if groups is not None and groups.layout.pp > 1:
        assert options.mode in ("pipeline", "full"), "the other modes need the whole model"
        return Pipelined(runner, policy, links_between(groups, runner.model, policy, options))
    assert options.mode != "pipeline", "there is one stage"
    if options.mode == "self_speculative":
        return SelfSpeculative(runner, options.draft_length)
    kind = RecomputeKV if options.mode == "kv_recompute" else CatchUp
    return kind(runner, options.max_pending)
