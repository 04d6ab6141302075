"""The command line end to end: what a user runs, what lies in the run directory afterwards."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from eellm.metrics.names import describe
from tests.command_line import run_py
from tests.train.fitting import BASE

RANKS = {"single": 1, "tp2": 2, "pp2": 2}
SMALL = [override for override in BASE if not override.startswith("task=")]


def quickstart(run: Path, *overrides: str) -> str:
    shared = [f"hydra.run.dir={run}", f"data.cache_dir={run.parent / 'cache'}", "evaluation.speed_thresholds=[0.0,0.5]"]
    return run_py(*SMALL, *shared, "decoding.max_new_tokens=6", "evaluation.batches=2", *overrides).stdout


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str]:
    """A quickstart run and what it printed."""
    return folder / "single", quickstart(folder / "single", "logger=csv")


def test_quickstart_leaves_the_whole_contract(finished: tuple[Path, str]) -> None:
    run, printed = finished
    files = "config.yaml overrides.txt status.json metrics.jsonl metrics.json metrics.csv tokenizer.json exits.csv trade_off.csv"
    for name in (*files.split(), "generations.jsonl", "speed_quality.csv", "report.html"):
        assert (run / name).is_file(), name
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_0000004", "step_0000006"]
    assert [row["head"] for row in table(run / "exits.csv")] == ["exit_01", "exit_02", "exit_03", "final"]
    assert len(table(run / "speed_quality.csv")) == 3, "full depth and two thresholds"
    assert str(run) in printed.splitlines()[-1], "the last line says where everything is"


def test_every_metric_has_a_name_in_the_table(finished: tuple[Path, str]) -> None:
    run, _ = finished
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in [*rows, json.loads((run / "metrics.json").read_text())]:
        for key in set(row) - {"step", "time"}:
            assert describe(key).unit


def test_threshold_zero_leaves_at_the_first_exit_and_never_pays_in_layers(finished: tuple[Path, str]) -> None:
    full, zero, _ = table(finished[0] / "speed_quality.csv")
    assert float(full["mean_layers"]) == 4
    assert float(full["agreement"]) == 1
    assert float(zero["mean_layers"]) == 1
    assert float(zero["share_exit_01"]) == 1


def test_the_same_on_a_pipeline(finished: tuple[Path, str], folder: Path) -> None:
    """Training and evaluation over two stages, decoding on one rank: the same tables."""
    quickstart(folder / "pp2", "parallel=pp2")
    for single, pipelined in zip(table(finished[0] / "exits.csv"), table(folder / "pp2" / "exits.csv"), strict=True):
        for column in ("loss", "accuracy", "agreement", "calibration_error"):
            assert float(pipelined[column]) == pytest.approx(float(single[column]), rel=2e-3, abs=2e-3), (single["head"], column)
    generations = (folder / "pp2" / "generations.jsonl").read_text().splitlines()
    assert len(generations) == 6, "three prompts with exits and three at full depth"


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
def test_evaluate_a_checkpoint_on_another_layout(layout: str, finished: tuple[Path, str], folder: Path) -> None:
    run = folder / f"evaluate_{layout}"
    modes = ["evaluation.decodings=[self_speculative,catch_up]", "evaluation.speed_thresholds=[0.0]", "decoding.max_new_tokens=6"]
    evaluated = ["evaluation.batches=2", *modes, f"hydra.run.dir={run}"]
    run_py("task=evaluate", f"checkpoint={finished[0]}", f"parallel={layout}", *evaluated, ranks=RANKS[layout])
    rows, trained_rows = table(run / "speed_quality.csv"), table(finished[0] / "speed_quality.csv")
    assert [row["decoding"] for row in rows] == ["full", "self_speculative", "catch_up"]
    assert (rows[1]["agreement"], rows[1]["share_final"]) == ("1.0", "1.0")
    for column in ("policy", "threshold", "agreement", "mean_layers", "share_exit_01"):
        assert rows[2][column] == trained_rows[1][column], "the quickstart has decoded the same prompts"
    for trained, evaluated in zip(table(finished[0] / "exits.csv"), table(run / "exits.csv"), strict=True):
        for column, value in trained.items():
            wanted = value if column == "head" else pytest.approx(float(value), rel=1e-4, abs=1e-6)
            assert (evaluated[column] if column == "head" else float(evaluated[column])) == wanted


def test_evaluate_over_pipeline_stages(finished: tuple[Path, str], folder: Path) -> None:
    """The pipeline at every threshold is what the quickstart's catching up was on one rank, on the same prompts."""
    run = folder / "evaluate_pipeline"
    overrides = ["evaluation.speed_thresholds=[0.0,0.5]", "decoding.max_new_tokens=6", "evaluation.batches=2"]
    overrides += [f"checkpoint={finished[0]}", "parallel=pp2", "decoding=pipeline", f"hydra.run.dir={run}"]
    run_py("task=evaluate", *overrides, ranks=2)
    rows, trained_rows = table(run / "speed_quality.csv"), table(finished[0] / "speed_quality.csv")
    assert [row["decoding"] for row in rows] == ["full", "pipeline", "pipeline"]
    for own, wanted in zip(rows, trained_rows, strict=True):
        for column in ("policy", "threshold", "agreement", "mean_layers", "share_exit_01", "share_final"):
            assert own[column] == wanted[column], column
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["generate/agreement"] >= 0.95
    assert metrics["generate/tokens_per_second"] in {float(row["tokens_per_second"]) for row in rows}


@pytest.mark.parametrize(("layout", "mode"), [("single", "catch_up"), ("pp2", "pipeline")])
def test_benchmark_of_a_checkpoint_reads_its_own_text(layout: str, mode: str, finished: tuple[Path, str], folder: Path) -> None:
    run = folder / f"benchmark_{layout}"
    short = ["benchmark.pairs=1", "benchmark.thresholds=[0.0]", "decoding.max_new_tokens=6"]
    short += ["benchmark.batches=[2]"] if layout == "single" else []
    overrides = [f"parallel={layout}", f"benchmark.decodings=[{mode}]", *short, f"hydra.run.dir={run}"]
    run_py("task=benchmark", "benchmark=decoding", f"checkpoint={finished[0]}", *overrides, ranks=RANKS[layout])
    full, zero = table(run / "speed_quality.csv")
    assert (full["decoding"], zero["decoding"]) == ("full", mode)
    for column in ("policy", "threshold", "agreement", "mean_layers", "share_exit_01"):
        assert zero[column] == table(finished[0] / "speed_quality.csv")[1][column]


def test_generate_full_depth_and_early_exit(finished: tuple[Path, str], folder: Path) -> None:
    texts = {}
    for name, overrides in {
        "full": ["decoding=full"],
        "never": ["exit_policy=never"],
        "always": ["exit_policy.threshold=0.0"],
        "speculative": [
            "decoding=self_speculative",
            "decoding.draft_length=2",
            "exit_policy.threshold=0.0",
            "decoding.max_batch=2",
        ],
    }.items():
        run = folder / f"generate_{name}"
        prompts = "decoding.prompts=['import email','class ']"
        shared = [f"checkpoint={finished[0]}", prompts, "decoding.max_new_tokens=8", f"hydra.run.dir={run}"]
        run_py("task=generate", *shared, *overrides)
        texts[name] = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    for lossless in ("never", "speculative"):
        assert [row["text"] for row in texts[lossless]] == [row["text"] for row in texts["full"]]
    metrics = json.loads((folder / "generate_speculative" / "metrics.json").read_text())
    assert 0 <= metrics["generate/acceptance_rate"] <= 1
    assert metrics["generate/mean_accepted_length"] == pytest.approx(2 * metrics["generate/acceptance_rate"], rel=0.2, abs=0.05)
    assert {token["exit_layer"] for row in texts["full"] for token in row["tokens"]} == {4}
    for row in texts["always"]:  # the first token comes with the prompt, at full depth
        assert [token["exit_layer"] for token in row["tokens"]] == [4] + [1] * (len(row["tokens"]) - 1)


def test_generate_over_pipeline_stages(finished: tuple[Path, str], folder: Path) -> None:
    """What the first stage writes is what one rank writes."""
    rows = {}
    for name, overrides in {"catch_up": [], "pipeline": ["parallel=pp2", "decoding=pipeline"]}.items():
        run = folder / f"stages_{name}"
        shared = [f"checkpoint={finished[0]}", "decoding.prompts=['import email','class ']", "decoding.max_new_tokens=8"]
        fixed = ["exit_policy=fixed_layer", "exit_policy.layer=2", f"hydra.run.dir={run}"]
        run_py("task=generate", *shared, *fixed, *overrides, ranks=2 if name == "pipeline" else 1)
        rows[name] = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
        assert {row["decoding"] for row in rows[name]} == {name}
        assert json.loads((run / "metrics.json").read_text())["generate/tokens_per_second"] > 0
        assert (run / "report.html").is_file()
    for one, two in zip(rows["catch_up"], rows["pipeline"], strict=True):
        assert (two["prompt"], two["text"], two["stop_reason"]) == (one["prompt"], one["text"], one["stop_reason"])
        assert [(token["id"], token["head"]) for token in two["tokens"]] == [
            (token["id"], token["head"]) for token in one["tokens"]
        ]
        assert [token["exit_layer"] for token in two["tokens"]] == [4] + [2] * (len(two["tokens"]) - 1)


def test_resume_continues_where_it_stopped(finished: tuple[Path, str], folder: Path) -> None:
    run = folder / "resumed"
    overrides = [*BASE, f"data.cache_dir={folder / 'cache'}"]
    run_py(*overrides, "trainer.max_steps=4", "lr_schedule.decay_steps=6", f"hydra.run.dir={run}")
    run_py(f"resume={run}", "task=train", "trainer.max_steps=6")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row.get("train/loss/final"), row.get("val/loss/exit_02")) for row in rows]
    assert losses == [(row["step"], row.get("train/loss/final"), row.get("val/loss/exit_02")) for row in wanted]


def test_a_full_disk_loses_nothing(finished: tuple[Path, str], folder: Path) -> None:
    run = folder / "full"
    shutil.copytree(finished[0], run)
    before = (run / "metrics.jsonl").read_text()
    overrides = ["trainer.max_steps=8", "trainer.val_every=0", "parallel=dp2"]
    said = run_py("task=train", f"resume={run}", *overrides, succeed=False, largest_file=40 * 1024).stderr
    assert f"cannot write {run}/checkpoints/step_0000008.partial: " in said
    assert "the system stopped taking data" in said
    assert "Traceback" not in said
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert "the system stopped taking data" in status["error"]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_0000004", "step_0000006"]
    after = (run / "metrics.jsonl").read_text()
    assert after.startswith(before)
    assert [json.loads(line)["step"] for line in after[len(before) :].splitlines()] == [7, 8]
    run_py("task=train", f"resume={run}", *overrides, ranks=2)
    assert (run / "checkpoints" / "step_0000008" / "eellm.json").is_file()


def test_a_warm_start_says_what_it_took_and_goes_on_without_its_source(finished: tuple[Path, str], folder: Path) -> None:
    source, run = folder / "source", folder / "warm"
    shutil.copytree(finished[0], source)
    exits = ["exits.layers=[2,3]", "exits.head=mlp", "exits.tie_output=true", "exits.init=copy"]
    data = [override for override in SMALL if override.startswith(("data.", "data="))]
    short = ["trainer.max_steps=2", "trainer.val_every=0", "trainer.checkpoint_every=0", "lr_schedule.warmup_steps=0"]
    overrides = [*data, f"data.cache_dir={folder / 'cache'}", *short, "trainer.log_every=1", f"hydra.run.dir={run}"]
    said = run_py("task=train", f"checkpoint={source}", "parallel=pp2", *exits, *overrides, ranks=2).stdout
    assert f"warm start from {source}/checkpoints/step_0000006, exits: kept exit_02; completed (init=copy) exit_03\n" in said
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    trained = [json.loads(text) for text in (source / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss/final"] for row in trained if "train/loss/final" in row]
    assert first["step"] == 1
    assert first["train/loss/final"] < losses[0] - 0.5 * (losses[0] - losses[-1]), "it begins where the source left off"
    shutil.rmtree(source)
    run_py("task=train", f"resume={run}", "trainer.max_steps=3", ranks=2)
    assert f"checkpoint: {source}" in (run / "config.yaml").read_text()
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_0000002", "step_0000003"]


def test_a_missing_checkpoint_is_named_without_a_traceback(folder: Path) -> None:
    result = run_py("task=evaluate", f"checkpoint={folder / 'nowhere'}", succeed=False)
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
