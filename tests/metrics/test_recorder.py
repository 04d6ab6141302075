import csv
import json
import math

import pytest

from eellm.metrics.recorder import Recorder, open_recorder
from eellm.metrics.rows import read_rows
from eellm.metrics.tables import read_table, write_table
from tests.metrics.example_config import example_config


def strict_json(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def csv_as_rows(path):
    with open(path, newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell != ""} for row in csv.DictReader(file)]


def same_number(left, right):
    return left == right or (math.isnan(left) and math.isnan(right))


def assert_same_rows(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert all(same_number(one[name], other[name]) for name in one)


def test_jsonl_is_valid_json_also_for_nan_and_infinity(tmp_path):
    recorder = open_recorder(example_config(), tmp_path, True)
    recorder.log(1, {"train/loss/final": math.nan, "train/grad_norm": math.inf, "train/lr": -math.inf, "train/step_time": 0.1})
    row = strict_json((tmp_path / "metrics.jsonl").read_text())
    assert row.pop("time") > 1e9
    assert row == {
        "step": 1,
        "train/loss/final": "NaN",
        "train/grad_norm": "Infinity",
        "train/lr": "-Infinity",
        "train/step_time": 0.1,
    }
    back = read_rows(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(back["train/loss/final"])
    assert back["train/grad_norm"] == math.inf
    assert back["train/lr"] == -math.inf


def test_rows_are_on_disk_before_close(tmp_path):
    recorder = open_recorder(example_config(), tmp_path, True)
    for step in range(3):
        recorder.log(step, {"train/lr": step / 3})
        assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(step + 1))
        assert [row["step"] for row in csv_as_rows(tmp_path / "metrics.csv")] == list(range(step + 1))


def test_csv_equals_jsonl_while_the_header_grows(tmp_path):
    recorder = open_recorder(example_config(), tmp_path, True)
    recorder.log(1, {"train/loss/final": 1 / 3})
    recorder.log(2, {"train/loss/final": math.nan, "train/grad_norm": math.inf})
    recorder.log(2, {"val/loss/final": 1e-300, "val/loss/exit_02": 2.0})
    recorder.log(3, {"train/loss/final": 0.1})
    recorder.close({}, "done")
    assert_same_rows(csv_as_rows(tmp_path / "metrics.csv"), read_rows(tmp_path / "metrics.jsonl"))


def test_resume_drops_what_will_be_written_again(tmp_path):
    first = open_recorder(example_config(), tmp_path, True)
    for step in range(1, 8):
        first.log(step, {"train/loss/final": 10.0 + step})
    first.close({}, "failed")
    second = open_recorder(example_config(), tmp_path, True, resume_step=4)
    second.log(5, {"train/loss/final": 25.0, "train/loss/exit_02": 1.0})
    second.close({}, "done")
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["train/loss/final"]) for row in rows] == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 14.0), (5, 25.0)]
    assert_same_rows(csv_as_rows(tmp_path / "metrics.csv"), rows)


def test_reopening_without_a_step_continues_the_record(tmp_path):
    for step in (1, 2):
        recorder = open_recorder(example_config(), tmp_path, True)
        recorder.log(step, {"train/lr": 0.5})
        recorder.close({}, "done")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_line_cut_off_by_a_kill_is_dropped_and_not_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 2.0}\n{"step": 2, "ti')
    assert [row["step"] for row in read_rows(path)] == [1]
    recorder = open_recorder(example_config(), tmp_path, True)
    recorder.log(2, {"train/lr": 0.5})
    assert [strict_json(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_other_ranks_write_nothing(tmp_path):
    recorder = open_recorder(example_config(), tmp_path, False)
    recorder.log(1, {"train/lr": 0.1})
    recorder.table("exits", [{"head": "final"}])
    recorder.html("report", "<p>")
    recorder.close({}, "done")
    assert list(tmp_path.iterdir()) == []


def test_csv_is_off_when_not_chosen(tmp_path):
    open_recorder(example_config({"logger.csv": False}), tmp_path, True).log(1, {"train/lr": 0.1})
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_close_twice_ends_sinks_once():
    class Counting:
        closed = 0

        def close(self, final, status):
            self.closed += 1

    sink = Counting()
    recorder = Recorder([sink])
    recorder.close({}, "failed")
    recorder.close({}, "done")
    assert sink.closed == 1


TABLE = [
    {"threshold": 0.5, "head": "exit_02", "tokens": 3, "note": None, "active": True},
    {"threshold": math.inf, "head": 'a,"b"\nc', "tokens": -1, "note": "x", "extra": 1e-12},
]


def test_a_table_becomes_a_csv_that_reads_back(tmp_path):
    open_recorder(example_config(), tmp_path, True).table("exits", TABLE)
    complete = {"note": None, "active": None, "extra": None}
    assert read_table(tmp_path / "exits.csv") == [complete | row for row in TABLE]


def test_a_table_reads_back_through_pandas(tmp_path):
    import pandas

    write_table(tmp_path / "t.csv", TABLE)
    frame = pandas.read_csv(tmp_path / "t.csv")
    assert list(frame.columns) == ["threshold", "head", "tokens", "note", "active", "extra"]
    assert frame["threshold"].tolist() == [0.5, math.inf]
    assert frame["extra"].tolist()[1] == 1e-12


def test_an_empty_table_is_an_empty_list(tmp_path):
    write_table(tmp_path / "t.csv", [])
    assert read_table(tmp_path / "t.csv") == []
    with pytest.raises(FileNotFoundError):
        (tmp_path / "t.csv.tmp").stat()
