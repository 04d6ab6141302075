"""`task=benchmark` as a user starts it, and what it refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import time
from pathlib import Path

import pytest

from eellm.config.compose import compose
from eellm.errors import ConfigError
from eellm.plan.case import Case
from eellm.plan.iteration import iterate
from eellm.tasks import benchmark
from tests.benchmark.models import TINY
from tests.command_line import run_py

COLUMNS = ["name", "layout", "value", "unit", "median", "low", "high", "target", "bound", "meets", "note"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("layout", "ranks"), [("single", 1), ("pp2", 2)])
def test_two_pairs_end_to_end(layout: str, ranks: int, tmp_path: Path) -> None:
    begin = time.monotonic()
    run = tmp_path / "run"
    tiny = [override for override in TINY if "parallel" not in override]
    printed = run_py(*tiny, f"parallel={layout}", "benchmark.pairs=2", f"hydra.run.dir={run}", ranks=ranks).stdout
    assert time.monotonic() - begin < 90, "half a minute on two free cores"
    with (run / "benchmark.csv").open() as file:
        reader = csv.DictReader(file)
        rows = {row["name"]: row for row in reader}
    assert reader.fieldnames == COLUMNS
    assert {row["layout"] for row in rows.values()} == {layout}
    assert ("plain/time_ratio" in rows) == (layout == "single")
    time_row = rows["time/ratio"]
    assert float(time_row["low"]) <= float(time_row["value"]) == float(time_row["median"]) <= float(time_row["high"])
    assert time_row["meets"] == str(float(time_row["value"]) <= 1.05)
    added = float(rows["memory/with_exits"]["value"]) - float(rows["memory/without_exits"]["value"])
    assert float(rows["memory/added"]["value"]) == pytest.approx(added)
    assert rows["memory/added_to_rank"]["meets"] == "True"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics == {f"benchmark/{name}": pytest.approx(float(row["value"])) for name, row in rows.items()}
    assert max(map(len, printed.splitlines()[:-1])) <= 100
    assert re.search(r"difference / exits alone .* ≤ 1\.050 +(yes|no)", printed)


@pytest.mark.slow
@pytest.mark.dist
def test_what_the_planner_predicted_is_what_task_plan_says(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny = [override for override in TINY if override not in ("task=benchmark", "device=cpu")]
    printed = run_py(*TINY, "benchmark=planner", "parallel=pp2", "benchmark.pairs=2", f"hydra.run.dir={run}", ranks=2).stdout
    with (run / "benchmark.csv").open() as file:
        rows = {row["name"]: float(row["value"]) for row in csv.DictReader(file)}
    config = compose(["task=plan", *tiny, "parallel=pp2", "device_profile=measured", f"device_profile.path={run}"])
    assert iterate(Case.of(config, 1000), "one_f_one_b").time == pytest.approx(rows["plan/step"])
    timed = config.device_profile.timed
    assert timed is not None
    assert timed.layer == pytest.approx([rows["pass/layer_forward"], rows["pass/layer_backward"]])
    assert timed.heads["norm"] == pytest.approx([rows["pass/norm_forward"], rows["pass/norm_backward"]])
    assert re.search(r"predicted / measured - 1.* ≤ 0\.150 +(yes|no)", printed)


@pytest.mark.slow
@pytest.mark.dist
def test_decoding_with_random_weights_end_to_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = [override for override in TINY if override.startswith(("model", "exits", "device", "tokenizer"))]
    overrides = ["benchmark.pairs=2", "decoding.max_new_tokens=6", "benchmark.thresholds=[0.2,1.0]", "benchmark.batches=[1,3]"]
    printed = run_py("task=benchmark", "benchmark=decoding", *model, *overrides, f"hydra.run.dir={run}").stdout
    with (run / "benchmark.csv").open() as file:
        reader = csv.DictReader(file)
        rows = {row["name"]: row for row in reader}
    assert reader.fieldnames == COLUMNS
    assert {"full/of_products", "catch_up/of_bound", "batch_1/full", "batch_3/self_speculative"} <= set(rows)
    assert (rows["self_speculative/differing"]["value"], rows["self_speculative/differing"]["meets"]) == ("0.0", "True")
    assert rows["full/over_transformers"]["target"] == "1.5"
    assert ("not run: transformers is not installed" in printed) == (importlib.util.find_spec("transformers") is None)
    with (run / "speed_quality.csv").open() as file:
        table = list(csv.DictReader(file))
    shares = ["share_exit_01", "share_exit_02", "share_exit_03", "share_final"]
    measured = ["tokens_per_second", "speedup", "agreement", "accuracy", "mean_layers"]
    assert list(table[0]) == ["decoding", "policy", "threshold", *measured, *shares]
    modes = [(mode, threshold) for mode in ("catch_up", "kv_recompute", "self_speculative") for threshold in ("0.2", "1.0")]
    assert [(row["decoding"], row["threshold"]) for row in table] == [("full", ""), *modes]
    assert {row["agreement"] for row in table if row["decoding"] in ("full", "self_speculative")} == {"1.0"}
    assert (run / "figures" / "speed_quality.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "figures" / "speed_quality.svg").is_file()
    assert "…" not in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 100
    assert re.search(r"full depth / these .* ≥ 0\.800 +(yes|no)", printed)


@pytest.mark.parametrize("override", ["exits=none", "checkpoint=outputs/train/default/2026-01-31_12-00-00"])
def test_what_cannot_be_measured_is_refused_before_anything_starts(override: str) -> None:
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0]}.*task=benchmark"):
        compose(["task=benchmark", override])


def test_the_vocabulary_needs_no_tokenizer() -> None:
    assert benchmark.vocab_size(compose(TINY)) == 1000
