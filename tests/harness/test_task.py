"""`task=evaluate evaluation=lm_eval` end to end, offline, on the model that comes with eellm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eellm.metrics.names import describe
from eellm.metrics.tables import TableRow, read_table
from tests.harness.local_tasks import GROUP, NAMES, QUESTIONS, TEXTS, write_tasks

ROOT = Path(__file__).resolve().parents[2]
THRESHOLDS = [0.3, 0.7, 1.0]


def run_py(folder: Path, *overrides: str) -> str:
    command = [sys.executable, str(ROOT / "run.py"), "task=evaluate", "evaluation=lm_eval", "device=cpu", *overrides]
    environment = {**os.environ, "HF_HOME": str(folder.parent / "hf"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, f"hydra.run.dir={folder}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run over all kinds of tasks, a group among them, and what it printed."""
    folder = tmp_path_factory.mktemp("harness")
    tasks = write_tasks(folder / "tasks")
    names = [GROUP, *(name for name in NAMES if name not in ("py_choice", "py_next"))]
    printed = run_py(
        folder / "run",
        *(f"evaluation.tasks=[{','.join(names)}]", f"evaluation.include_path={tasks}", "evaluation.bootstrap=20"),
        *(f"evaluation.thresholds={THRESHOLDS}", "evaluation.decodings=[catch_up,self_speculative]", "decoding.max_new_tokens=8"),
    )
    return folder / "run", printed


def test_there_is_a_row_for_every_setting_task_and_metric(finished: tuple[Path, str]) -> None:
    rows = read_table(finished[0] / "lm_eval.csv")
    settings = [("full", None), *((mode, value) for mode in ("catch_up", "self_speculative") for value in THRESHOLDS)]
    scores = [("py_choice", "acc"), ("py_next", "perplexity"), ("py_next", "acc"), ("py_text", "bits_per_byte")]
    scores += [("py_write", "exact_match"), (GROUP, "acc")]
    assert {(row["decoding"], row["threshold"], row["task"], row["metric"]) for row in rows} == {
        (*setting, *score) for setting in settings for score in scores
    }
    assert len(rows) == len(settings) * len(scores)
    samples = {"py_text": len(TEXTS), GROUP: 2 * len(QUESTIONS)}
    for row in rows:
        assert row["samples"] == samples.get(str(row["task"]), len(QUESTIONS))
        assert row["cut"] == 0
        assert isinstance(row["stderr"], float) or row["metric"] == "bits_per_byte", "the harness has none for it"
        assert (row["scored_tokens_per_second"] is None) == (row["task"] == "py_write")
        assert (row["generated_tokens_per_second"] is None) == (row["task"] != "py_write")


def test_speculation_changes_no_score_and_a_threshold_does(finished: tuple[Path, str]) -> None:
    rows = read_table(finished[0] / "lm_eval.csv")
    full = {(row["task"], row["metric"]): row for row in rows if row["decoding"] == "full"}
    for row in rows:
        same = full[row["task"], row["metric"]]
        if row["decoding"] == "self_speculative":
            assert row["score"] == pytest.approx(same["score"], rel=1e-5)
            assert row["mean_layers"] == 12
    eager = [row for row in rows if row["decoding"] == "catch_up" and row["threshold"] == THRESHOLDS[0]]
    careful = [row for row in rows if row["decoding"] == "catch_up" and row["threshold"] == THRESHOLDS[-2]]
    for row, other in zip(eager, careful, strict=True):
        assert float(str(row["mean_layers"])) < float(str(other["mean_layers"])) < 12
    (bits,) = [row["score"] for row in eager if row["metric"] == "bits_per_byte"]
    assert bits != pytest.approx(full["py_text", "bits_per_byte"]["score"], rel=1e-3)


def test_speed_is_that_of_decoding_and_equal_for_all_tasks(finished: tuple[Path, str]) -> None:
    rows, speeds = read_table(finished[0] / "lm_eval.csv"), read_table(finished[0] / "speed_quality.csv")
    wanted = {(row["decoding"], row["threshold"]): (row["tokens_per_second"], row["speedup"]) for row in speeds}
    for row in rows:
        assert (row["tokens_per_second"], row["speedup"]) == wanted[row["decoding"], row["threshold"]]


def test_the_run_shows_and_records_what_it_found(finished: tuple[Path, str]) -> None:
    run, printed = finished
    metrics = json.loads((run / "metrics.json").read_text())
    full = {
        row["task"]: row["score"]
        for row in read_table(run / "lm_eval.csv")
        if (row["decoding"], row["metric"]) == ("full", "acc")
    }
    assert {name: metrics[f"lm_eval/{name}/acc"] for name in full} == full
    for name in metrics:
        describe(name)
    assert "Tasks of lm-evaluation-harness" in printed
    assert (run / "figures" / "lm_eval.png").stat().st_size > 10_000
    assert "py_write" in (run / "report.html").read_text()


@pytest.mark.dist
def test_a_run_over_pipeline_stages_scores_as_one_rank_does(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Its main rank holds the whole model for it."""
    run_py(
        tmp_path / "run",
        *("parallel=pp2", "evaluation.tasks=[py_choice]", f"evaluation.include_path={finished[0].parent / 'tasks'}"),
        *("evaluation.thresholds=[0.3]", "evaluation.decodings=[catch_up]", "decoding.max_new_tokens=8"),
    )
    alone = {key(row): row["score"] for row in read_table(finished[0] / "lm_eval.csv")}
    rows = read_table(tmp_path / "run" / "lm_eval.csv")
    assert [row["decoding"] for row in rows] == ["full", "catch_up"]
    assert all(row["score"] == alone[key(row)] for row in rows)


def key(row: TableRow) -> tuple[object, ...]:
    return row["decoding"], row["threshold"], row["task"], row["metric"]
