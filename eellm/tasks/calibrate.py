"""`task=calibrate`: exit thresholds whose risk is bounded with high probability, certified on held-out text."""

from __future__ import annotations

import sys

import torch

from eellm.calibration.certify import certify
from eellm.calibration.losses import LossOptions, SequenceLosses, sequence_losses, threshold_grid
from eellm.calibration.result import Calibration, HeldOutText, TrainedModel, trained_model
from eellm.calibration.table import NOTE, calibration_rows, calibration_table, verdict
from eellm.config.schema import Config
from eellm.data.corpus import Corpus
from eellm.metrics import names
from eellm.model.spec import ModelSpec
from eellm.tasks import evaluate
from eellm.tasks.context import TaskContext
from eellm.tasks.session import Plan, is_main_rank, process_group, recording


def run(context: TaskContext) -> dict[str, float]:
    corpus = Corpus.load(context.run.corpus)
    spec = Plan.of(context.config, corpus.vocab_size).spec
    with process_group(context.config) as device, recording(context) as (recorder, final):
        found = calibration_of(context.config, held_out_losses(context, spec, device), spec, corpus)
        recorder.table("calibration", calibration_rows(found))
        final |= {names.CALIBRATE_RISK: found.chosen.risk, names.CALIBRATE_MEAN_LAYERS: found.chosen.mean_layers}
    if is_main_rank():
        found.save(context.run.calibration)
        show(context, found)
    return final


def held_out_losses(context: TaskContext, spec: ModelSpec, device: torch.device) -> SequenceLosses:
    config = context.config
    grid = threshold_grid(config.calibration.thresholds, active_exits(config, spec), spec.exit_layers)
    options = LossOptions(config.calibration.risk, grid, config.trainer.loss_chunk)
    return evaluate.on_held_out_text(context, device, config.calibration.batches, sequence_losses, options)


def calibration_of(config: Config, sample: SequenceLosses, spec: ModelSpec, corpus: Corpus) -> Calibration:
    """The verdict on a sample, with where it comes from."""
    options, data = config.calibration, config.data
    return Calibration(
        risk=options.risk,
        epsilon=options.epsilon,
        delta=options.delta,
        active=active_exits(config, spec),
        sequences=len(sample.losses),
        tokens=int(sample.chosen[0].sum()),
        tests=certify(sample, options, spec),
        model=model_of(config),
        data=HeldOutText(corpus.fingerprint, data.split, data.sequence_length, data.document_boundaries),
    )


def active_exits(config: Config, spec: ModelSpec) -> list[int]:
    return spec.exit_layers if config.exit_policy.active is None else config.exit_policy.active


def model_of(config: Config) -> TrainedModel:
    assert config.checkpoint is not None, "checked with the config"
    return trained_model(config.checkpoint, config.precision.dtype)


def show(context: TaskContext, calibration: Calibration) -> None:
    from rich.console import Console

    from eellm.report.terminal import location_line

    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(calibration_table(calibration))
    console.print(NOTE, style="dim")
    console.print()
    console.print(verdict(calibration), highlight=False)
    console.print()
    console.print(location_line(context.run_dir), soft_wrap=True)
