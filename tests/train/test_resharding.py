"""Weights, moments and steps are the same bits after every change of layout and of the optimizer's kind.

`pytest -s tests/train/test_resharding.py` prints the table.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from eellm.config.compose import compose
from eellm.data.corpus import prepare_corpus
from tests import workers
from tests.train.fitting import BASE, train
from tests.train.saved_states import reshard, whole_tensors

CHAIN = {
    "tp2": (2, ["parallel=tp2", "parallel.sequence_parallel=true"]),
    "single distributed": (1, ["optimizer=adam_distributed"]),
    "pp2_vp2": (2, ["parallel=pp2_vp2"]),
    "pp2_dp2 distributed": (4, ["parallel=pp2", "parallel.dp=2", "optimizer=adam_distributed"]),
}
SHORT = ["trainer.max_steps=2", "trainer.val_every=0", "trainer.checkpoint_every=0"]
CASES = {
    "fp32": ("pp2_dp2 distributed", [], list(CHAIN), ["exp_avg", "exp_avg_sq"]),
    # exits that make sizes no multiple of 64, which megatron-core's own form of distributed states does not survive
    "bf16": (
        "single distributed",
        ["precision=bf16", "exits.layers=[2,3]", "exits.head=[block,mlp]", "exits.tie_output=true"],
        ["tp2", "pp2_dp2 distributed"],
        ["exp_avg", "exp_avg_sq", "fp32_param"],
    ),
    "sgd": ("tp2", ["optimizer=sgd"], ["pp2_vp2"], ["momentum_buffer"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs go, beside a cache with the corpus in it: it is prepared before ranks start."""
    folder = tmp_path_factory.mktemp("resharding")
    prepare_corpus(compose([*BASE, f"data.cache_dir={folder / 'cache'}"]))
    return folder


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_resharding_keeps_every_bit(case: str, runs: Path, tmp_path: Path) -> None:
    start, common, chain, states = CASES[case]
    world, overrides = CHAIN[start]
    workers.run(world, train, [*SHORT, *overrides, *common], str(runs / case))
    folder = runs / case / "checkpoints" / "step_0000002"
    expected = whole_tensors(folder, tmp_path)
    parameters = [name for name in expected if not name.startswith("optimizer.")]
    assert set(expected) == {*parameters, *(f"optimizer.state.{state}.{name}" for state in states for name in parameters)}
    assert all(expected[f"optimizer.state.{state}.{name}"].any() for state in states for name in parameters)
    rows = [("layout", "tensors", "different", "largest difference", "step"), (start, len(expected), 0, 0.0, 2)]
    for number, layout in enumerate(chain):
        world, overrides = CHAIN[layout]
        target = tmp_path / f"step_{number:07d}"
        [step] = set(workers.run(world, reshard, [*overrides, *common], str(runs / "cache"), str(folder), str(target)))
        actual, folder = whole_tensors(target, tmp_path), target
        assert set(actual) == set(expected)
        different = [name for name in expected if not torch.equal(actual[name], expected[name])]
        largest = max((actual[name].float() - expected[name].float()).abs().max().item() for name in expected)
        rows.append((layout, len(actual), len(different), largest, step))
        assert not different, different
        assert step == (None if case == "sgd" else 2)
    sys.stdout.write(f"\n{case}\n" + "".join("{:<22}{:>9}{:>11}{:>20}{:>6}\n".format(*map(str, row)) for row in rows))
