"""Runs on forked ranks: the evaluation of a freshly initialised model on a layout, and its whole parameters for the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from eellm.data.batch import GlobalBatch
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.engine.megatron import MegatronEngine
from eellm.evaluation.exits import Evaluation, EvaluationOptions, evaluate
from eellm.layout import ParallelLayout
from eellm.mcore.groups import init_groups
from eellm.model.objective import ObjectiveOptions
from eellm.model.spec import ModelSpec, plan_stages, tied_stages

SEED, SEQUENCE, GLOBAL_BATCH, MICRO, BATCHES = 11, 16, 8, 2, 2
MASKED_LABEL = -100


@dataclass(frozen=True)
class Case:
    """What is evaluated, on which layout. Initial parameters do not depend on the layout."""

    spec: ModelSpec
    layout: dict = field(default_factory=dict)
    boundary: str = "end"
    options: EvaluationOptions = field(default_factory=EvaluationOptions)

    @property
    def parallel(self) -> ParallelLayout:
        return ParallelLayout(**self.layout, micro_batch_size=MICRO, global_batch_size=GLOBAL_BATCH)


def global_batches(spec: ModelSpec, dp_rank: int = 0, dp: int = 1) -> list[GlobalBatch]:
    """One data-parallel rank's share of the data: the first microbatch of all is masked, of the others a third of the tokens.

    Labels that do not count are no ids, so that reading one fails.
    """
    generator = torch.Generator().manual_seed(5)
    shape = (GLOBAL_BATCH // MICRO, MICRO, SEQUENCE)
    batches = []
    for number in range(BATCHES):
        text = torch.randint(0, spec.vocab_size, (*shape[:2], SEQUENCE + 1), generator=generator)
        mask = (torch.rand(shape, generator=generator) > 1 / 3).float()
        if number == 0:
            mask[0] = 0.0
        labels = torch.where(mask > 0, text[..., 1:], MASKED_LABEL)
        parts = (text[..., :-1], labels, mask, torch.arange(SEQUENCE).expand(shape))
        batches.append(GlobalBatch(*(part[dp_rank::dp].contiguous() for part in parts)))
    return batches


def build(case: Case) -> Chunks:
    plan = plan_stages(case.spec, case.parallel, boundary=case.boundary)
    groups = init_groups(case.parallel, torch.device("cpu"), tied_stages(case.spec, plan))
    return build_chunks(case.spec, plan, groups, ChunkOptions(seed=SEED))


def evaluated(rank: int, case: Case) -> Evaluation:
    chunks = build(case)
    batches = global_batches(case.spec, chunks.groups.dp_rank, case.parallel.dp)
    engine = MegatronEngine(chunks, ObjectiveOptions())
    return evaluate(engine, batches, case.spec, chunks.groups, case.options)


def whole_parameters(rank: int, spec: ModelSpec) -> dict:
    """Global name -> array, on one rank."""
    (stage,) = build(Case(spec)).stages
    return {stage.global_name(name): parameter.detach().numpy() for name, parameter in stage.named_parameters()}
