"""Runs on forked ranks: tiny models with random weights whose exits fire, and what decoding makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from eellm.decoding.continuation import Request, Token
from eellm.decoding.counters import Counters
from eellm.decoding.decoder import CATCH_UP, Decoder, DecoderOptions
from eellm.decoding.model.lean_layer import DecodingContext, LeanLayer
from eellm.decoding.policy import Policy
from eellm.engine.chunks import build_stages
from eellm.layout import ParallelLayout
from eellm.mcore.groups import init_groups
from eellm.mcore.parts import transformer_config
from eellm.model.spec import ExitSpec, ModelSpec, plan_stages, tied_stages
from eellm.model.stage import Stage
from tests.engine.layouts import tiny_spec

SEED = 11
PROMPT = (5, 17, 3, 42, 8)
MIXED_HEADS = (ExitSpec(1, "embedding"), ExitSpec(2, "mlp", tie_output=False, temperature=1.5), ExitSpec(3, "block"))
BLOCKS = (ExitSpec(1, "block"), ExitSpec(2, "block", temperature=0.7), ExitSpec(4, "block", tie_output=False))


def spec(**changes) -> ModelSpec:
    """Weights large enough that confidences vary from token to token."""
    return tiny_spec(**({"exits": MIXED_HEADS, "init_std": 0.4, "max_positions": 64} | changes))


def policy(
    spec_: ModelSpec, kind: str, thresholds: float | tuple[float, ...], active: tuple[int, ...] | None = None, least: int = 0
):
    active = tuple(spec_.exit_layers) if active is None else active
    values = thresholds if isinstance(thresholds, tuple) else (thresholds,) * len(active)
    return Policy(kind, active, values, spec_.vocab_size, least)


def build(spec_: ModelSpec, tp: int = 1, dtype: str = "fp32") -> Stage:
    layout = ParallelLayout(tp=tp)
    plan = plan_stages(spec_, layout)
    groups = init_groups(layout, torch.device("cpu"), tied_stages(spec_, plan))
    return build_stages(spec_, plan, groups, transformer_config(spec_, layout, dtype), SEED)[0].eval().requires_grad_(False)


def parameters(rank: int, spec_: ModelSpec, dtype: str = "fp32") -> dict:
    """Whole parameters by global name, as arrays of fp32."""
    stage = build(spec_, dtype=dtype)
    return {stage.global_name(name): parameter.detach().float().numpy() for name, parameter in stage.named_parameters()}


@dataclass(frozen=True)
class Job:
    """One sequence to decode."""

    spec: ModelSpec
    policy: Policy
    request: Request
    options: DecoderOptions = CATCH_UP
    prompt: tuple[int, ...] = PROMPT
    dtype: str = "fp32"
    tp: int = 1


@dataclass(frozen=True)
class Outcome:
    tokens: list[Token]
    pending: list[int]
    prefill: Counters
    steps: Counters


def decode(rank: int, job: Job) -> Outcome:
    return decode_with(build(job.spec, job.tp, job.dtype), job)


def decode_all(rank: int, jobs: list[Job]) -> list[Outcome]:
    """Jobs that share one model."""
    stage = build(jobs[0].spec, jobs[0].tp, jobs[0].dtype)
    return [decode_with(stage, job) for job in jobs]


def decode_with(stage: Stage, job: Job) -> Outcome:
    decoder = Decoder(stage, job.policy, job.options)
    sequence = decoder.start(job.prompt, job.request)
    pending = []
    while decoder.step():
        pending.append(sequence.queue.pending)
    return Outcome(sequence.tokens, pending, decoder.prefill, decoder.steps)


@contextmanager
def watching(record: Callable[[LeanLayer, DecodingContext], None]) -> Iterator[None]:
    """Tell of every passage through a layer or a block."""
    run = LeanLayer.__call__

    def passage(layer: LeanLayer, hidden: torch.Tensor, context: DecodingContext) -> torch.Tensor:
        record(layer, context)
        return run(layer, hidden, context)

    with mock.patch.object(LeanLayer, "__call__", passage):
        yield
