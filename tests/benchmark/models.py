"""Runs on forked ranks: parts of the benchmark on a tiny model, returned as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eellm.benchmark.exits_alone import ExitsAlone
from eellm.benchmark.plain_loss import LossAlone, plain_objective
from eellm.benchmark.step_memory import FirstStage, StepMemory, logits_bytes, step_memory
from eellm.benchmark.variants import Variant, Variants, build_variants
from eellm.mcore.groups import init_groups
from eellm.model.spec import tied_stages
from eellm.tasks.session import Plan
from tests.workers import composed

TINY = (
    *("task=benchmark", "parallel.dp=1", "device=cpu"),
    *("model.num_layers=4", "model.hidden_size=16", "model.num_attention_heads=2", "exits.layers=[1,2,3]"),
    *("data.sequence_length=16", "data.micro_batch_size=2", "data.global_batch_size=8", "tokenizer.vocab_size=1000"),
    *("trainer.loss_chunk=4096", "loss_weights.values=[0.3,0.5,0.7]"),
)
"""Logits are by far the largest tensors: a microbatch's are 62 times as large as its hidden states."""


@contextmanager
def variants_of(*overrides: str) -> Iterator[Variants]:
    """Inside the process group of a test's ranks."""
    config = composed([*TINY, *overrides])
    plan = Plan.of(config, config.tokenizer.vocab_size or 0)
    groups = init_groups(plan.layout, torch.device("cpu"), tied_stages(plan.spec, plan.stages))
    yield build_variants(config, plan.spec, plan.stages, groups)


def memory_of_a_step(rank: int, *overrides: str) -> StepMemory:
    with variants_of(*overrides) as variants:
        for variant in (variants.with_exits, variants.without_exits):
            variant.run()
        return step_memory(variants)


def programs(rank: int, *overrides: str) -> tuple[str, str]:
    """Names of what runs with exits and without, after a step of each."""
    with variants_of(*overrides) as variants:
        for variant in (variants.with_exits, variants.without_exits):
            variant.run()
        return variants.with_exits.program.name, variants.without_exits.program.name


def growth(rank: int, in_flight: int, *overrides: str) -> dict[str, float]:
    with variants_of(*overrides) as variants:
        stage = FirstStage(variants.with_exits)
        return {
            "deferred": stage.growth(True, in_flight),
            "eager": stage.growth(False, in_flight),
            "hidden": stage.hidden_bytes,
            "logits": logits_bytes(variants.with_exits),
        }


def _gradients(variant: Variant) -> dict[str, torch.Tensor]:
    (stage,) = variant.chunks.stages
    return {name: parameter.main_grad.clone() for name, parameter in stage.named_parameters()}


def losses_and_gradients(rank: int, *overrides: str) -> dict[str, tuple]:
    """Of the whole loss of one microbatch, ours and plain: value, gradients of hidden states, gradients of parameters."""
    results = {}
    with variants_of(*overrides) as variants:
        loss = LossAlone(variants.with_exits)
        for name, work in {"ours": loss.ours, "plain": loss.plain}.items():
            variants.with_exits.chunks.zero_grad()
            value = work()
            hidden = [states.grad.clone() for states in loss.hidden]
            results[name] = (value.item(), _plain(hidden), _plain(_gradients(variants.with_exits).values()))
    return results


def gradients_of_the_exits(rank: int) -> tuple[list, list]:
    """What the exits alone leave in the gradient buffers after all microbatches, and what plain autograd gives."""
    with variants_of() as variants:
        variant = variants.with_exits
        chunks = variant.chunks
        alone = ExitsAlone(variant)
        (exits,) = alone.stages
        chunks.zero_grad()
        alone.run()
        actual = _gradients(variant)
        chunks.zero_grad()
        hidden = [exits.hidden.detach()] * len(exits.readouts)
        for index in range(len(variant.batch)):
            labels = variant.batch[index].labels.t().reshape(-1)
            plain_objective(exits.readouts, hidden, labels, variant.weights, exits.context).backward()
        return _plain(actual.values()), _plain(_gradients(variant).values())


def _plain(tensors) -> list:
    return [tensor.detach().numpy() for tensor in tensors]
