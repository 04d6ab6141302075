import json
import math
import time

import pandas as pd
import pytest

from eellm.analysis import (
    exit_table,
    load_runs,
    metric_history,
    reliability,
    settings_of,
    speed_quality,
    token_table,
)
from eellm.config.compose import compose, to_yaml
from eellm.errors import RunError, as_typed
from tests.analysis.run_folders import STARTED, write_run


def test_a_row_a_run_with_what_varies(tmp_path):
    for number, (weight, seed, layers) in enumerate([(0.1, 1, [2, 4]), (0.1, 2, [2, 4]), (1, 1, [4])]):
        settings = {"loss_weights.values": weight, "seed": seed, "exits.layers": layers, "name": f"run{number}"}
        write_run(tmp_path / "study" / str(number), settings, {"val/loss/final": 4.0 + number})
    runs = load_runs(tmp_path)
    assert settings_of(runs) == ["seed", "exits.layers", "loss_weights.values"]
    assert list(runs["name"]) == ["run0", "run1", "run2"]
    assert list(runs["seed"]) == [1, 2, 1]
    assert list(runs["exits.layers"]) == ["[2,4]", "[2,4]", "[4]"]
    assert list(runs["val/loss/final"]) == [4.0, 5.0, 6.0]
    assert set(runs["status"]) == {"done"}
    assert set(runs["seconds"]) == {60.0}
    assert set(runs["started"]) == {pd.Timestamp(STARTED, unit="s", tz="UTC")}
    assert runs["run"].tolist() == [str(tmp_path / "study" / str(number)) for number in range(3)]
    shared = {
        "study.name": "weights",
        "task.name": "train",
        "model.num_layers": 8,
        "model.rotary_scaling": None,
        "exits.head": "norm",
    }
    assert runs.attrs == {"shared": shared, "broken": []}


def test_settings_that_are_asked_for_are_columns_though_they_do_not_differ(tmp_path):
    for number in range(2):
        write_run(tmp_path / str(number), {"exits.layers": [number]}, {"val/loss/final": 4.0})
    runs = load_runs(tmp_path, ["seed", "exits.layers", "name", "no.such"])
    assert settings_of(runs) == ["exits.layers", "seed", "no.such"]
    assert list(runs["seed"]) == [1, 1]
    assert runs["no.such"].isna().all()
    assert runs.attrs == load_runs(tmp_path).attrs
    assert set(exit_table(runs)["seed"]) == {1}, "in every frame made of it"


def test_null_and_none_at_all_are_the_same_and_a_truth_value_is_no_number(tmp_path):
    write_run(tmp_path / "old", {"model.new": None, "model.flag": True})
    write_run(tmp_path / "new", {"model.flag": 1})
    assert settings_of(load_runs(tmp_path)) == ["model.flag"]


def test_a_real_config_is_read_as_it_was_composed(tmp_path):
    """The file is parsed in parts, which has to come to the same."""
    prompts = ["import os\n\nimport ", "a: b\n# c", "- d"]
    config = compose([])
    config = config.model_copy(update={"decoding": config.decoding.model_copy(update={"prompts": prompts})})
    for name in "ab":
        (write_run(tmp_path / name) / "config.yaml").write_text(to_yaml(config))
    expected = {key: as_typed(value) if isinstance(value, list) else value for key, value in config.flat().items()}
    runs = load_runs(tmp_path)
    assert runs.attrs["shared"] == expected
    assert settings_of(runs) == []


def test_runs_are_found_wherever_they_lie_but_not_inside_another(tmp_path):
    write_run(tmp_path / "outputs" / "train" / "a")
    write_run(tmp_path / "outputs" / "train" / "a" / "wandb" / "inner")
    write_run(tmp_path / "multirun" / "b")
    (tmp_path / "multirun" / "b" / ".hydra").mkdir()
    (tmp_path / "multirun" / "notes").mkdir()
    assert len(load_runs(tmp_path)) == 2
    assert len(load_runs(tmp_path / "outputs" / "train" / "a")) == 1
    assert len(load_runs([tmp_path / "outputs", tmp_path / "multirun"])) == 2


def broken_status(run):
    (run / "status.json").write_text('{"state": "do')


def broken_metrics(run):
    (run / "metrics.json").write_text('{"val/loss/final": 4.')


def no_config(run):
    (run / "config.yaml").unlink()


def broken_config(run):
    (run / "config.yaml").write_text("name: a\nmodel: {num_layers: [\n")


def empty_config(run):
    (run / "config.yaml").write_text("")


def unreadable(run):
    (run / "metrics.json").unlink()
    (run / "metrics.json").mkdir()


def binary(run):
    (run / "config.yaml").write_bytes(b"name: \xff\xfe")


def stateless(run):
    (run / "status.json").write_text("{}")


def saying(name, text):
    return lambda run: (run / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (broken_status, "status.json is not JSON"),
        (broken_metrics, "metrics.json is not JSON"),
        (no_config, "config.yaml: No such file"),
        (broken_config, "config.yaml is not a mapping in YAML"),
        (empty_config, "config.yaml is not a mapping in YAML"),
        (unreadable, "metrics.json: Is a directory"),
        (binary, "config.yaml is not a mapping in YAML"),
        (stateless, "status.json does not say"),
        (saying("status.json", '{"state": ["done"]}'), "status.json does not say"),
        (saying("status.json", '{"state": "failed", "error": {}}'), "status.json: error is {}"),
        (saying("status.json", '{"state": "done", "started": null}'), "status.json: started is None"),
        (saying("status.json", '{"state": "done", "started": [1], "updated": 2}'), "status.json: started is [1]"),
        (saying("status.json", '{"state": "done", "started": 1, "updated": "2"}'), "status.json: updated is '2'"),
        (saying("status.json", '{"state": "done", "started": 1e30, "updated": NaN}'), "status.json: started is 1e+30"),
        (saying("status.json", "[1]"), "status.json holds a list"),
        (saying("metrics.json", '{"val/loss/final": "low"}'), "metrics.json: val/loss/final is 'low'"),
        (saying("metrics.json", '{"val/loss/final": {"mean": 4.0}}'), "metrics.json: val/loss/final is {'mean': 4.0}"),
        (saying("metrics.json", '{"val/loss/final": true}'), "metrics.json: val/loss/final is True"),
        (saying("metrics.json", "3"), "metrics.json holds a int"),
    ],
)
def test_broken_runs_are_reported(tmp_path, damage, named):
    write_run(tmp_path / "good")
    damage(write_run(tmp_path / "bad"))
    runs = load_runs(tmp_path)
    assert list(runs["run"]) == [str(tmp_path / "good")]
    ((path, reason),) = runs.attrs["broken"]
    assert path == str(tmp_path / "bad")
    assert named in reason


def test_only_broken_runs_are_no_error(tmp_path):
    no_config(write_run(tmp_path / "bad"))
    runs = load_runs(tmp_path)
    assert (len(runs), len(runs.attrs["broken"])) == (0, 1)
    assert {"run", "name", "status"} <= set(runs.columns)
    assert len(metric_history(runs)) == len(exit_table(runs)) == 0


def test_no_runs_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no run directory in it"):
        load_runs(tmp_path)
    with pytest.raises(RunError, match="there is no such folder"):
        load_runs(tmp_path / "absent")


def test_history_is_long_and_keeps_what_varies(tmp_path):
    for seed in (1, 2):
        history = [{"step": step, "time": 100.0 + step, "val/loss/final": seed + step, "train/lr": 0.1} for step in (10, 20)]
        write_run(
            tmp_path / str(seed), {"seed": seed}, history=[*history, {"step": 20, "time": 130.0, "val/loss/final": math.nan}]
        )
    frame = metric_history(load_runs(tmp_path), "val/*")
    assert list(frame.columns) == ["run", "name", "seed", "step", "seconds", "metric", "value"]
    assert frame["value"].dropna().tolist() == [11.0, 21.0, 12.0, 22.0]
    assert frame["seconds"].tolist() == [0.0, 10.0, 20.0] * 2
    assert set(metric_history(load_runs(tmp_path))["metric"]) == {"val/loss/final", "train/lr"}
    assert len(metric_history(load_runs(tmp_path), ["train/lr", "no/*"])) == 4


ROW, TEXT = '{"step": 1, "time": 0.0, "train/lr": 0.1}\n', {"prompt": "a", "text": "b", "decoding": "catch_up", "threshold": 0.5}
GOOD_EXITS = "head,layer,loss\nfinal,8,4.0\n"
TOKEN = {"text": "b", "head": "final", "exit_layer": 8, "confidence": 0.5, "logprob": -1.0}


def text_of(changes, **token):
    return json.dumps({**TEXT, "tokens": [{**TOKEN, **token}], **changes}) + "\n"


@pytest.mark.parametrize(
    ("read", "file", "good", "bad", "reason"),
    [
        (metric_history, "metrics.jsonl", ROW, '{"step": 1, "ti\n' + ROW, "line 1: Unterminated string"),
        (metric_history, "metrics.jsonl", ROW, ROW + "[1,2]\n", "line 2: holds [1, 2], not an object"),
        (metric_history, "metrics.jsonl", ROW, "3\n", "line 1: holds 3, not an object"),
        (metric_history, "metrics.jsonl", ROW, '{"step": null, "time": 0.0}\n', "line 1: step is None, not a number"),
        (metric_history, "metrics.jsonl", ROW, '{"step": 1.5, "time": 0.0}\n', "line 1: step is 1.5, not a whole number"),
        (metric_history, "metrics.jsonl", ROW, '{"step": "NaN", "time": 0.0}\n', "line 1: step is nan"),
        (metric_history, "metrics.jsonl", ROW, '{"step": 1}\n', "line 1: time is missing"),
        (metric_history, "metrics.jsonl", ROW, ROW.replace("0.1", '"fast"'), "line 1: train/lr is 'fast', not a number"),
        (metric_history, "metrics.jsonl", ROW, ROW.replace("0.1", "true"), "line 1: train/lr is True, not a number"),
        (metric_history, "metrics.jsonl", ROW, ROW.replace("0.1", "1" + "0" * 400), "line 1: train/lr is 1000"),
        (token_table, "generations.jsonl", text_of({}), text_of({"tokens": None}), "line 1: tokens is None, not a list"),
        (token_table, "generations.jsonl", text_of({}), text_of({"tokens": [1]}), "line 1: tokens is [1], not a list of objects"),
        (token_table, "generations.jsonl", text_of({}), text_of({}) + "[1]\n", "line 2: holds [1], not an object"),
        (token_table, "generations.jsonl", text_of({}), text_of({"prompt": None}), "line 1: prompt is None, not a text"),
        (token_table, "generations.jsonl", text_of({}), text_of({"threshold": "x"}), "line 1: threshold is 'x'"),
        (token_table, "generations.jsonl", text_of({}), text_of({}, head="exit_a"), "line 1: head is 'exit_a', not a head's"),
        (token_table, "generations.jsonl", text_of({}), text_of({}, logprob=[1]), "line 1: logprob is [1], not a number or null"),
        (exit_table, "exits.csv", GOOD_EXITS, "head,layer\nfinal,8,4.0\n", "line 2: 3 cells for 2 columns"),
        (exit_table, "exits.csv", GOOD_EXITS, "head,layer,loss\nfinal,8\n", "line 2: 2 cells for 3 columns"),
        (exit_table, "exits.csv", GOOD_EXITS, "layer,loss\n8,4.0\n", "head is None"),
        (exit_table, "exits.csv", GOOD_EXITS, "head,layer,loss\nfinal,8,low\n", "loss is 'low'"),
        (speed_quality, "speed_quality.csv", "decoding,speedup\nfull,1\n", "decoding,speedup\n,1\n", "decoding is None"),
        (reliability, "reliability.csv", "head,confidence,accuracy\nfinal,1,1\n", "head,bin\nfinal,first\n", "bin is 'first'"),
    ],
)  # fmt: skip
def test_a_broken_file_costs_its_run_only(tmp_path, read, file, good, bad, reason):
    for name, content in (("good", good), ("bad", bad)):
        (write_run(tmp_path / name) / file).write_text(content)
    runs = load_runs(tmp_path)
    frame = read(runs)
    assert list(frame["run"]) == [str(tmp_path / "good")]
    ((path, said),) = frame.attrs["broken"]
    assert path == str(tmp_path / "bad")
    assert said.startswith(file)
    assert reason in said
    assert runs.attrs["broken"] == []


def test_tables_of_runs(tmp_path):
    rows = [{"decoding": "full", "threshold": None, "speedup": 1.0}, {"decoding": "catch_up", "threshold": 0.5, "speedup": 1.2}]
    for seed in (1, 2):
        write_run(tmp_path / str(seed), {"seed": seed}, tables={"speed_quality": rows})
    write_run(tmp_path / "none", {"seed": 3})
    frame = speed_quality(load_runs(tmp_path))
    assert frame.drop(columns=["run", "name"]).to_dict("list") == {
        "seed": [1, 1, 2, 2], "decoding": ["full", "catch_up"] * 2, "threshold": [pytest.approx(math.nan, nan_ok=True), 0.5] * 2,
        "speedup": [1.0, 1.2] * 2,
    }  # fmt: skip


def test_a_thousand_runs_in_five_seconds(tmp_path):
    text = to_yaml(compose(["task=train"]))
    for number in range(1000):
        run = tmp_path / f"{number:04d}"
        run.mkdir()
        (run / "config.yaml").write_text(
            text.replace("seed: 1\n", f"seed: {number}\n").replace("norm_eps: ", f"norm_eps: {number}")
        )
        (run / "status.json").write_text(json.dumps({"state": "done", "started": STARTED, "updated": STARTED + number}))
        (run / "metrics.json").write_text(json.dumps({f"val/loss/exit_{layer:02d}": number / layer for layer in range(1, 30)}))
        (run / "metrics.jsonl").write_text('{"step": 1, "time": 0.0}\n')
    started = time.process_time()  # other processes' share of the cores is not at issue
    runs = load_runs(tmp_path)
    assert time.process_time() - started < 5
    assert settings_of(runs) == ["seed", "model.norm_eps"]
    assert runs["seed"].tolist() == list(range(1000))
