"""A signal at any moment of training, to any of the ranks: a checkpoint at the end of the step, and an equal end after it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from eellm.config.compose import compose
from eellm.data.corpus import prepare_corpus
from eellm.preemption import Preempted, heeded
from tests import workers
from tests.faults.runs import untimed
from tests.train.fitting import BASE, train

LAYOUT = ["parallel=pp2", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=9"]


class Signal(Callback):
    """Sends this process a signal from inside `hook`, at `step`."""

    def __init__(self, hook: str, step: int, number: int):
        def send(trainer, *_: object) -> None:
            if trainer.global_step == step:
                os.kill(os.getpid(), number)

        setattr(self, hook, send)


def interrupted(rank: int, told: int, hook: str, step: int, run_dir: str) -> tuple[str, list[str]]:
    """Train until rank `told` is sent SIGUSR1; the signal's name and the checkpoints, as this rank sees them."""
    extra = [Signal(hook, step, signal.SIGUSR1)] if rank == told else []
    try:
        with heeded(impatient=False):
            train(rank, LAYOUT, run_dir, extra_callbacks=extra)
    except Preempted as preempted:
        return str(preempted), sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())
    return "nothing", []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preemption")
    prepare_corpus(compose([*BASE, f"data.cache_dir={folder / 'cache'}"]))
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict]:
    workers.run(2, train, LAYOUT, str(folder / "whole"))
    return rows(folder / "whole")


def rows(run: Path) -> list[dict]:
    return [untimed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("hook", "step", "last"),
    [
        ("on_train_batch_start", 0, 1),
        ("on_validation_batch_start", 3, 3),
        ("on_save_checkpoint", 4, 5),
        ("on_train_end", 6, 6),
    ],
)
@pytest.mark.parametrize("told", [0, 1])
def test_one_rank_is_told_and_all_end_with_a_checkpoint(
    hook: str, step: int, last: int, told: int, whole: list[dict], folder: Path
) -> None:
    run = folder / f"{hook}_{told}"
    for name, checkpoints in workers.run(2, interrupted, told, hook, step, str(run)):
        assert name == "SIGUSR1"
        assert checkpoints[-1] == f"step_{last:07d}"
    assert rows(run) == [row for row in whole if row["step"] <= last], "the step's validation, where one is due, is on record"
    if told == 0 and last < 6:
        workers.run(2, train, LAYOUT, str(folder / f"{hook}_rest"), str(run / "checkpoints" / f"step_{last:07d}"))
        assert rows(folder / f"{hook}_rest") == [row for row in whole if row["step"] > last]
