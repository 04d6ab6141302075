"""NaN in a loss or a gradient of one stage: nothing is updated with it, and the run stops or goes on without the step."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from eellm.config.compose import compose
from eellm.data.corpus import prepare_corpus
from eellm.errors import NonFiniteError
from eellm.mcore.optimizer import MegatronOptimizer, StepResult
from tests import workers
from tests.faults.runs import records, tensors, untimed
from tests.train.fitting import BASE, train

SHARED = [
    "parallel=pp2",
    "trainer.checkpoint_every=1",
    "trainer.keep_checkpoints=9",
    "trainer.val_every=0",
    "trainer.max_steps=4",
]
STEP = 2
"""0-based: the third step goes wrong."""
BOUNDS = {
    "clipped": [],
    "unclipped": ["optimizer.clip_grad=0"],
    "distributed": ["optimizer=adam_distributed"],
}


def mlp_weight(parameters: dict[str, torch.nn.Parameter]) -> torch.nn.Parameter:
    (weight, *_) = [value for name, value in parameters.items() if name.endswith("linear_fc1.weight")]
    return weight


class Poison(Callback):
    """For one step: a NaN among the weights of exit 2, on stage 0 (`loss`), or in one gradient of stage 1 (`gradient`)."""

    def __init__(self, what: str):
        self.what = what

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step != STEP:
            return
        parameters = dict(module.chunks.stages[0].named_parameters())
        if self.what == "loss" and module.groups.pp_rank == 0:
            (self.weight, *_) = [value for name, value in parameters.items() if "exit_02." in name]
            self.good = self.weight.detach().clone()
            self.weight.data.view(-1)[0] = math.nan
        if self.what == "gradient" and module.groups.pp_rank == 1:
            self.hook = mlp_weight(parameters).register_hook(lambda gradient: gradient * math.nan)

    def on_train_batch_end(self, trainer, module, *_) -> None:
        if self.what == "loss" and hasattr(self, "weight"):
            self.weight.data.copy_(self.good)
            del self.weight
        if hasattr(self, "hook"):
            self.hook.remove()


class Skip(Callback):
    """The oracle: the optimizer is simply not asked in that step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        skipped = trainer.global_step == STEP
        step = (lambda: StepResult("overflow", 0.0)) if skipped else lambda: MegatronOptimizer.step(module.megatron_optimizer)
        module.megatron_optimizer.step = step


def poisoned(rank: int, what: str, overrides: list[str], run_dir: str) -> str:
    """The message of the run's error, or nothing."""
    try:
        train(rank, [*SHARED, *overrides], run_dir, extra_callbacks=[Skip() if what == "skip" else Poison(what)])
    except NonFiniteError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nonfinite")
    prepare_corpus(compose([*BASE, f"data.cache_dir={folder / 'cache'}"]))
    return folder


def equal(left: Path, right: Path) -> None:
    """Weights and optimizer states, bit by bit."""
    mine, wanted = tensors(left), tensors(right)
    assert mine.keys() == wanted.keys()
    assert any("exp_avg_sq" in name for name in mine)
    for name, value in wanted.items():
        assert torch.equal(mine[name], value), name


@pytest.mark.dist
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing(what: str, bound: str, folder: Path) -> None:
    oracle, run = folder / f"skip_{bound}", folder / f"{what}_{bound}"
    allowed = [*BOUNDS[bound], "trainer.max_nonfinite_steps=1"]
    if not oracle.exists():
        workers.run(2, poisoned, "skip", allowed, str(oracle))
    assert workers.run(2, poisoned, what, allowed, str(run)) == ["", ""]
    before, after, end = (run / "checkpoints" / f"step_{step:07d}" for step in (STEP, STEP + 1, 4))
    equal(after, before)
    equal(end, oracle / "checkpoints" / end.name)
    for row, wanted in zip(records(run), records(oracle), strict=True):
        counted = {"train/nonfinite_steps": float(row["step"] > STEP)}
        if row["step"] == STEP + 1:
            assert row["train/grad_norm"] == "NaN"
            assert (row["train/loss/exit_02"] == "NaN") == (what == "loss")
            assert row["train/loss/final"] == wanted["train/loss/final"], "NaN in an exit does not reach the final head"
        else:
            assert untimed(row) == untimed(wanted) | counted


@pytest.mark.dist
def test_the_error_names_step_head_and_stage(folder: Path) -> None:
    run = folder / "stopped"
    messages = workers.run(2, poisoned, "loss", [], str(run))
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 3: the loss of exit_02 (pipeline stage 0) is nan. Nothing was updated")
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_0000001", "step_0000002"]
    equal(run / "checkpoints" / "step_0000002", folder / "skip_clipped" / "checkpoints" / "step_0000002")


@pytest.mark.dist
def test_the_error_names_stage_and_parameters(folder: Path) -> None:
    messages = workers.run(2, poisoned, "gradient", [], str(folder / "stopped_by_gradient"))
    assert messages[0] == messages[1]
    first = "step 3: gradients are not finite: pipeline stage 1: layers."
    assert messages[0].startswith(first)
    assert "linear_fc1.weight" in messages[0].partition("; ")[0]


@pytest.mark.dist
def test_fp16_overflow_is_the_scalers_until_its_scale_cannot_fall(folder: Path) -> None:
    """A NaN that stays: the second step halves the scale to its minimum of 1, which the third cannot blame any more."""
    overrides = ["precision=fp16", "precision.initial_loss_scale=2", "trainer.max_steps=6"]
    messages = workers.run(2, lasting, overrides, str(folder / "fp16"))
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 3: gradients are not finite: pipeline stage 1: layers."), messages[0]


def lasting(rank: int, overrides: list[str], run_dir: str) -> str:
    """With a NaN in a gradient of stage 1 from the first step on."""

    class Lasting(Poison):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if trainer.global_step == 0 and module.groups.pp_rank == 1:
                parameters = dict(module.chunks.stages[0].named_parameters())
                mlp_weight(parameters).register_hook(lambda gradient: gradient * math.nan)

        def on_train_batch_end(self, *_) -> None:
            pass

    try:
        train(rank, [*SHARED, *overrides], run_dir, extra_callbacks=[Lasting("gradient")])
    except NonFiniteError as error:
        return str(error)
    return ""
