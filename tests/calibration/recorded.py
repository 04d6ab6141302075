"""Runs on a spawned rank: losses of a calibration, of a freshly initialised or a trained model; text decoded with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from eellm.calibration.losses import LossOptions, SequenceLosses, sequence_losses
from eellm.config.compose import compose
from eellm.data.corpus import Corpus
from eellm.decoding.generation import Generation
from eellm.engine.megatron import MegatronEngine
from eellm.model.objective import ObjectiveOptions
from eellm.quiet import quiet_dependencies
from eellm.tasks import calibrate, generate
from eellm.tasks.before_ranks import prepare
from eellm.tasks.context import TaskContext
from eellm.tasks.session import Plan
from tests.evaluation.layouts import Case, build, global_batches


def losses_on_rank(rank: int, case: Case, options: LossOptions) -> SequenceLosses:
    chunks = build(case)
    batches = global_batches(case.spec, chunks.groups.dp_rank, case.parallel.dp)
    return sequence_losses(MegatronEngine(chunks, ObjectiveOptions()), batches, case.spec, chunks.groups, options)


def losses_of_run(rank: int, overrides: list[str], run_dir: str) -> np.ndarray:
    """[N, T] of a trained model, on the held-out text of the config."""
    quiet_dependencies()
    context = TaskContext(compose(overrides), Path(run_dir))
    context.run_dir.mkdir(parents=True)
    prepare(context)
    spec = Plan.of(context.config, Corpus.load(context.run.corpus).vocab_size).spec
    return calibrate.held_out_losses(context, spec, torch.device("cpu")).losses


def generations(rank: int, overrides: list[str], run_dir: str) -> list[Generation]:
    quiet_dependencies()
    return generate.generate(TaskContext(compose(overrides), Path(run_dir)), torch.device("cpu"), {})
