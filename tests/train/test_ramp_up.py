"""Training while the batch grows: 4, 4, 6, 8, 8, 8 sequences, on any layout and across a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eellm.config.compose import compose
from eellm.metrics.flops import training_flops
from eellm.model.spec import build_spec
from tests import workers
from tests.train.fitting import BASE, train
from tests.train.test_fit import rows, same

RAMP = [
    "data.ramp_up={start:4,increment:2,samples:10}",
    "lr_schedule.decay_steps=6",
    "loss_weights=warmup",
    "loss_weights.steps=4",
]
SAVED = [*RAMP, "trainer.checkpoint_every=2", "trainer.keep_checkpoints=3"]
LAYOUTS = {
    "dp2_micro1": (2, ["parallel=dp2", "data.micro_batch_size=1"]),
    "pp2_vp2_micro1": (2, ["parallel=pp2_vp2", "data.micro_batch_size=1"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ramp_up")


@pytest.fixture(scope="module")
def single(folder: Path) -> dict:
    """An uninterrupted run on one rank."""
    return workers.run(1, train, SAVED, str(folder / "single"))[0]


def steps(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if "train/loss/final" in row]


def test_the_batch_grows_sample_after_sample(single: dict, folder: Path) -> None:
    assert [row["train/batch_size"] for row in steps(folder / "single")] == [4, 4, 6, 8, 8, 8]
    assert single["seen"] == list(range(38))


def test_small_batches_are_averaged_as_in_a_run_of_small_batches(single: dict, folder: Path) -> None:
    fixed = [*RAMP[1:], "data.global_batch_size=4", "trainer.max_steps=2", "trainer.val_every=0"]
    workers.run(1, train, fixed, str(folder / "fixed"))
    same(rows(folder / "fixed"), rows(folder / "single")[:2], 1e-6)


def test_validation_has_the_full_size(single: dict, folder: Path) -> None:
    """Untrained, on the same held-out batches: the same loss with the ramp as without."""
    still = ["optimizer.lr=1e-30", "trainer.max_steps=1", "trainer.val_every=1"]
    for name, ramp in {"with": RAMP[:1], "without": []}.items():
        workers.run(1, train, [*still, *ramp], str(folder / name))
    before, after = (
        {key: value for key, value in rows(folder / name)[-1].items() if key.startswith("val/")} for name in ("with", "without")
    )
    assert before == pytest.approx(after, rel=1e-6)
    assert "val/loss/final" in before


def test_speed_counts_the_tokens_that_were_read(single: dict, folder: Path) -> None:
    config = compose([*BASE, *RAMP])
    flops = training_flops(build_spec(config, vocab_size=300), sequence_length=32)
    for row in steps(folder / "single"):
        tokens = row["train/batch_size"] * 32
        assert row["train/tokens_per_second"] * row["train/step_time"] == pytest.approx(tokens)
        assert row["train/tflops"] == pytest.approx(row["train/tokens_per_second"] * flops / 1e12)


@pytest.mark.parametrize("name", ["single", *LAYOUTS])
def test_resumed_in_the_middle_of_the_ramp(name: str, single: dict, folder: Path) -> None:
    """After 2 of 6 steps: the same samples in the same steps, the same losses, on this layout or another."""
    world, overrides = LAYOUTS.get(name, (1, []))
    checkpoint = str(folder / "single" / "checkpoints" / "step_0000002")
    results = workers.run(world, train, [*SAVED, *overrides], str(folder / f"resumed_{name}"), checkpoint)
    assert [row["train/batch_size"] for row in steps(folder / f"resumed_{name}")] == [6, 8, 8, 8]
    assert sorted({number for result in results for number in result["seen"]}) == list(range(8, 38))
    if world == 1:
        assert results[0]["seen"] == single["seen"][8:]
    expected = [row for row in rows(folder / "single") if row["step"] > 2]
    same(rows(folder / f"resumed_{name}"), expected, 1e-6 if world == 1 else 2e-4)
