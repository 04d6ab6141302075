"""Runs on forked ranks: requests through a pipeline, or through one rank as sequential catch-up decoding does it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from eellm.config.schema import DecodingConfig
from eellm.decoding.continuation import Continuation, Request, Token
from eellm.decoding.counters import Counters
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.generation import Generation, generate_texts
from eellm.decoding.model.kv_cache import KVCache
from eellm.decoding.pipeline.follower import Follower
from eellm.decoding.pipeline.links import MAX_IN_FLIGHT
from eellm.decoding.pipeline.messages import Message
from eellm.decoding.pipeline.mode import Pipelined
from eellm.decoding.policy import Policy
from eellm.engine.chunks import build_stages
from eellm.layout import ParallelLayout
from eellm.mcore.groups import Groups, init_groups
from eellm.mcore.parts import transformer_config
from eellm.model.spec import ModelSpec, plan_stages, tied_stages
from eellm.model.stage import Stage
from tests.decoding.models import SEED
from tests.decoding.test_generation import tokenizer

PIPELINED = DecoderOptions("pipeline")


@dataclass(frozen=True)
class Cut:
    """How a model is spread over ranks, and the type of its weights."""

    pp: int = 1
    tp: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    boundary: str = "end"
    dtype: str = "fp32"

    @property
    def layout(self) -> ParallelLayout:
        return ParallelLayout(tp=self.tp, pp=self.pp)


@dataclass(frozen=True)
class Work:
    """Requests in order of arrival; `arrivals` says after how many steps each one is submitted (none: all at once)."""

    policy: Policy
    requests: list[tuple[tuple[int, ...], Request]]
    options: DecoderOptions = PIPELINED
    arrivals: list[int] = field(default_factory=list)

    def sequential(self) -> Work:
        return replace(self, options=replace(self.options, mode="catch_up"))


@dataclass(frozen=True)
class Result:
    """What a rank knows in the end. `tokens` and `ends` of all requests on the first stage; `kv`: by layer and slot, keys and
    values [tokens, groups of this rank, channels]."""

    tokens: list[list[Token]]
    ends: list[str | None]
    kv: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]
    prefill: Counters
    steps: Counters


def build(spec: ModelSpec, cut: Cut) -> tuple[Stage, Groups]:
    plan = plan_stages(spec, cut.layout, list(cut.layers_per_stage) if cut.layers_per_stage else None, cut.boundary)
    groups = init_groups(cut.layout, torch.device("cpu"), tied_stages(spec, plan))
    return build_stages(spec, plan, groups, transformer_config(spec, cut.layout, cut.dtype), SEED)[0].eval(), groups


def serve(rank: int, spec: ModelSpec, cut: Cut, works: list[Work]) -> list[Result]:
    """All work with one model."""
    stage, groups = build(spec, cut)
    return [follow(stage, groups, work) if groups.pp_rank else drive(stage, groups, work) for work in works]


def follow(stage: Stage, groups: Groups, work: Work) -> Result:
    follower = Follower(stage, work.policy, work.options, groups)
    follower.follow()
    return Result([], [], contents(follower.kv), follower.prefill, follower.steps)


def drive(stage: Stage, groups: Groups, work: Work) -> Result:
    decoder = Decoder(stage, work.policy, work.options, groups)
    sequences: list[Continuation] = []
    arrivals, number, steps = work.arrivals or [0] * len(work.requests), 0, 0
    while number < len(work.requests) or any(sequence.end is None for sequence in sequences):
        while number < len(work.requests) and arrivals[number] <= steps:
            sequences.append(decoder.submit(*work.requests[number]))
            number += 1
        emitted = decoder.step()
        passing = work.options.prefill_chunk is not None and any(not sequence.tokens for sequence in decoder.running)
        assert emitted or passing or all(sequence.end for sequence in sequences), "a step without a token although sequences run"
        steps += 1
    decoder.drain()
    decoder.close()
    tokens, ends = [sequence.tokens for sequence in sequences], [sequence.end for sequence in sequences]
    return Result(tokens, ends, contents(decoder._kv), decoder.prefill, decoder.steps)


def contents(kv: KVCache | None) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    assert kv is not None
    slots = range(kv.shape.sequences)
    return {
        (layer, slot): tuple(part.transpose(0, 1).float().numpy() for part in kv.read(layer, slot))
        for layer in kv.layers
        for slot in slots
    }


def run_ahead(rank: int, spec: ModelSpec, policy: Policy, folder: Path, count: int) -> list[int]:
    """How many messages the first stage is ahead of the second with each of `count` tokens: sent, and not asked for yet.

    The second stage takes the prompt, and asks for nothing more until the first one waits for room.
    """
    stage, groups = build(spec, Cut(2))
    waits, asked = folder / "waits", folder / "asked"
    if groups.pp_rank:
        follower = Follower(stage, policy, PIPELINED, groups)
        receive = follower.links.receive

        def held() -> Message:
            if asked.exists():
                wait_for(waits)
            with asked.open("a") as file:
                file.write(".")
            return receive()

        follower.links.receive = held
        follower.follow()
        return []
    decoder = Decoder(stage, policy, PIPELINED, groups)
    assert isinstance(decoder.mode, Pipelined)
    outbox = decoder.mode.links._messages
    wait = outbox.wait

    ahead: list[int] = []

    def watched(most: int = 0) -> None:
        # the first time it waits is for the prompt, which was taken long ago: the second stage is held until it waits in earnest
        if ahead and ahead[-1] == MAX_IN_FLIGHT:
            waits.touch()
        wait(most)

    outbox.wait = watched
    decoder.start((5, 17, 3), Request(count + 1))
    decoder.step()
    for sent in range(2, count + 2):
        decoder.step()
        ahead.append(sent - asked.stat().st_size)
    decoder.close()
    return ahead


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupted(rank: int, spec: ModelSpec, policy: Policy, requests: list[tuple[tuple[int, ...], Request]]) -> list[list[Token]]:
    """Tokens of four requests: one of the first two is stopped, then one of the rest dropped for the last, both at a moment
    when a token is on its way to them."""
    stage, groups = build(spec, Cut(2))
    options = replace(PIPELINED, max_batch=2, max_tokens=64)
    if groups.pp_rank:
        Follower(stage, policy, options, groups).follow()
        return []
    decoder = Decoder(stage, policy, options, groups)
    sequences = [decoder.submit(*request) for request in requests[:2]]
    stopped = one_behind(decoder)
    before, stopped.stopped = len(stopped.tokens), True
    sequences.append(decoder.submit(*requests[2]))
    while not sequences[2].tokens:
        decoder.step()
    dropped = one_behind(decoder)
    tokens = len(dropped.tokens)
    sequences.append(decoder.start(*requests[3]))
    while emitted := decoder.step():
        assert all(sequence is sequences[3] for sequence, _ in emitted)
    decoder.close()
    assert (len(stopped.tokens), len(dropped.tokens)) == (before, tokens)
    return [sequence.tokens for sequence in sequences]


def one_behind(decoder: Decoder) -> Continuation:
    """Step until a sequence waits for its token while another one has got one; returns the former."""
    while emitted := decoder.step():
        served = {sequence for sequence, _ in emitted}
        waiting = [sequence for sequence in decoder.running if sequence not in served]
        if waiting:
            return waiting[0]
    raise AssertionError("no sequence was ever behind")


def texts(rank: int, spec: ModelSpec, cut: Cut, policy: Policy, config: DecodingConfig) -> list[Generation]:
    """The config's prompts as `task=generate` continues them."""
    stage, groups = build(spec, cut)
    options = DecoderOptions.of(config)
    if groups.pp_rank:
        Follower(stage, policy, options, groups).follow()
        return []
    decoder = Decoder(stage, policy, options, groups)
    generations = generate_texts(decoder, tokenizer(), config.prompts, config, seed=1)
    decoder.close()
    return generations
