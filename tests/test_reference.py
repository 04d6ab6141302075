"""The model that comes with eellm: found where none is named, small, and with exits that differ."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path

import pytest

from eellm.config.compose import compose
from eellm.errors import ConfigError
from eellm.reference import reference_run
from eellm.rundir import RunDirectory, whole_checkpoint
from tests.command_line import run_py
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", ["generate", "evaluate", "calibrate", "serve"])
def test_it_is_read_where_no_model_is_named(task: str) -> None:
    config = compose([f"task={task}"])
    assert config.checkpoint == str(reference_run())
    assert (config.model.num_layers, config.exits.layers) == (12, [0.25, 0.5, 0.75])
    assert config.data.cache_dir == compose([]).data.cache_dir, "not that of the machine it was trained on"


def test_other_tasks_read_it_when_it_is_named() -> None:
    assert compose(["task=train"]).checkpoint is None
    assert compose(["task=train", "checkpoint=reference"]).checkpoint == str(reference_run())
    assert compose(["task=benchmark", "benchmark=decoding"]).checkpoint is None
    assert compose(["task=benchmark", "benchmark=decoding", "checkpoint=reference"]).model.num_layers == 12
    with pytest.raises(ConfigError, match="task=quickstart starts from random weights"):
        compose(["checkpoint=reference"])


def test_it_is_whole_and_small_and_its_recipe_is_the_experiment() -> None:
    _, step = whole_checkpoint("checkpoint", str(reference_run()))
    assert sum(path.stat().st_size for path in step.iterdir()) < 12e6
    recipe, reader = compose(["experiment=reference_model"]), compose(["task=evaluate"])
    assert reader.exits == recipe.exits
    assert reader.tokenizer == recipe.tokenizer
    assert reader.model.model_copy(update={"max_positions": None}) == recipe.model
    assert reader.data.model_copy(update={"cache_dir": ""}) == recipe.data.model_copy(update={"cache_dir": ""})
    assert step.name == f"step_{recipe.trainer.max_steps:07d}"


@pytest.mark.slow
def test_its_exits_differ_and_confident_tokens_are_common(runs: Path) -> None:
    """On text that it has not seen: eellm's own source."""
    text = ["data=text", f"data.path={ROOT / 'eellm'}", "data.pattern=**/*.py", "data.split=[0.2,0.8]"]
    text += [f"data.cache_dir={runs / 'cache'}", "evaluation.batches=8", "evaluation.decodings=[]"]
    run_py("task=evaluate", *text, f"hydra.run.dir={runs / 'evaluate'}", "device=cpu")
    losses = [float(row["loss"]) for row in rows(runs / "evaluate" / "exits.csv")]
    assert all(deeper < shallower - 0.1 for shallower, deeper in pairwise(losses[:3])), losses
    assert losses[3] < losses[2]
    (sure,) = [row for row in rows(runs / "evaluate" / "trade_off.csv") if float(row["threshold"]) == 0.5]
    assert float(sure["share_final"]) < 0.75
    assert float(sure["agreement"]) > 0.95


@pytest.mark.slow
def test_drafts_of_its_exits_are_accepted_and_change_nothing(runs: Path) -> None:
    options = ["task=generate", "decoding.max_new_tokens=48", "precision=fp32"]
    for mode, more in (("full", []), ("self_speculative", ["decoding.draft_length=3", "exit_policy.threshold=0.5"])):
        run_py(*options, f"decoding={mode}", *more, f"hydra.run.dir={runs / mode}", "device=cpu")
    texts = [(runs / mode / "generations.jsonl").read_text().splitlines() for mode in ("full", "self_speculative")]
    full, drafted = ([json.loads(line) for line in lines] for lines in texts)
    assert [row["text"] for row in drafted] == [row["text"] for row in full]
    metrics = json.loads(RunDirectory(runs / "self_speculative").final_metrics.read_text())
    assert metrics["generate/acceptance_rate"] > 0.3
