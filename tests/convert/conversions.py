"""Conversions as the task makes them, without its process, and runs to convert."""

from __future__ import annotations

from pathlib import Path

import torch

from eellm.config.compose import compose, to_yaml
from eellm.config.fingerprint import weights_fingerprint
from eellm.convert.exporting import export_model
from eellm.convert.importing import import_model
from eellm.convert.sources import open_source
from eellm.data.cache import cache_root
from eellm.mcore.whole_tensors import LazyTensor, read_checkpoint, write_checkpoint
from eellm.model.spec import ModelSpec
from eellm.rundir import RunDirectory
from eellm.tasks import convert
from eellm.tasks.context import TaskContext
from tests.convert import hugging_face


def imported(source: Path | str, target: Path, *overrides: str) -> ModelSpec:
    given = ["task=convert", f"convert.source={source}", f"convert.target={target}", *overrides]
    config = compose(given)
    return import_model(open_source(str(source), cache_root(config.data)), target, config, given)


def exported(source: Path, target: Path, *overrides: str) -> Path:
    given = ["task=convert", f"convert.source={source}", f"convert.target={target}", "convert.format=huggingface", *overrides]
    export_model(str(source), target, compose(given))
    return target


def converted(source: Path | str, target: Path, *overrides: str) -> RunDirectory:
    """What the task does in a directory of its own beside the target."""
    given = ["task=convert", f"convert.source={source}", f"convert.target={target}", *overrides]
    config = compose(given)
    own = RunDirectory.create(target.with_name(f"{target.name}_job"), to_yaml(config), given, weights_fingerprint(config))
    assert convert.run(TaskContext(config, own.path)) == {}
    return RunDirectory(target)


def weights(run: RunDirectory | Path) -> dict[str, torch.Tensor]:
    """Of a converted run, by global name."""
    path = run.path if isinstance(run, RunDirectory) else run
    return {name: tensor.read() for name, tensor in read_checkpoint(path / "checkpoints" / "step_0000000").items()}


def run_with_exits(row: str, folder: Path, exits: tuple[str, ...], dtype: torch.dtype = torch.float32) -> tuple[Path, ModelSpec]:
    """A run whose backbone is a random model of `transformers`, and whose exits are copies of nothing."""
    hugging_face.save(row, folder / "source")
    spec = imported(folder / "source", folder / "run", *exits)
    checkpoint = folder / "run" / "checkpoints" / "step_0000000"
    generator = torch.Generator().manual_seed(4)

    def shaken(name: str, tensor: LazyTensor) -> LazyTensor:
        noise = 0.2 * torch.randn(tensor.shape, generator=generator) if name.startswith("heads.exit_") else 0
        return LazyTensor.of((tensor.read() + noise).to(dtype))

    write_checkpoint(checkpoint, {name: shaken(name, tensor) for name, tensor in read_checkpoint(checkpoint).items()})
    return folder / "run", spec
