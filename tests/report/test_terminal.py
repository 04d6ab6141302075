import io
import json
import re

import pytest
from rich.console import Console

from eellm.metrics.tables import read_table
from eellm.report.run_record import load_run
from eellm.report.terminal import legend, location_line, print_report, sample_text, visible
from tests.report.example_run import CONTINUATION, PROMPT, THRESHOLDS, write_example_run

SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def printed(run_dir, width=100):
    file = io.StringIO()
    print_report(run_dir, Console(file=file, width=width))
    return file.getvalue()


def cells(line):
    return line.split()


@pytest.fixture(params=[((2, 4, 6), 8), (tuple(range(1, 9)), 12), (tuple(range(2, 24, 2)), 24)], ids=["3", "8", "11"])
def run_dir(request, tmp_path):
    layers, num_layers = request.param
    return write_example_run(tmp_path / "run", layers, num_layers)


def test_tables_are_whole_at_100_columns(run_dir):
    text = printed(run_dir)
    lines = text.splitlines()
    assert "…" not in text
    assert all(len(line.rstrip()) <= 100 for line in lines if str(run_dir) not in line)
    exits = {cells(line)[0]: cells(line) for line in lines if re.match(r"\s+(exit_\d\d|final)\s+\d+ ", line) and "%" in line}
    for row in read_table(run_dir / "exits.csv"):
        percents = [f"{100 * row[column]:.1f}%" for column in ("accuracy", "agreement")]
        numbers = [
            str(row["layer"]),
            f"{row['loss']:.3f}",
            f"{row['perplexity']:.1f}",
            *percents,
            f"{row['calibration_error']:.3f}",
        ]
        assert exits[row["head"]] == [row["head"], *numbers]


def test_speed_against_quality_has_every_threshold_and_every_share(run_dir):
    lines = [cells(line) for line in printed(run_dir).splitlines()]
    rows = read_table(run_dir / "speed_quality.csv")
    heads = [column.removeprefix("share_") for column in rows[0] if column.startswith("share_")]
    names = ["full", *map(str, THRESHOLDS)]
    many = len(heads) > 9
    for name, row in zip(names, rows, strict=True):
        shown = next(line for line in lines if line[:1] == [name] and len(line) >= 5)
        assert shown[:3] == [name, f"{row['tokens_per_second']:.1f}", f"{row['speedup']:.2f}"]
        assert shown[4] == f"{row['mean_layers']:.1f}"
        if not many:
            assert shown[5:] == [f"{100 * row[f'share_{head}']:.0f}" for head in heads]
    if many:
        start = next(index for index, line in enumerate(lines) if line[:1] == ["Share"])
        for head in heads:
            shown = next(line for line in lines[start:] if line[:1] == [head])
            assert shown[1:] == [f"{100 * row[f'share_{head}']:.0f}" for row in rows]


def test_small_tables_fit_80_columns(tmp_path):
    text = printed(write_example_run(tmp_path / "run"), width=80)
    assert "…" not in text
    assert "calib. error" in text


def test_the_sample_tells_exits_apart_without_colour(tmp_path):
    record = load_run(write_example_run(tmp_path / "run"))
    sample = record.generations[1]
    plain = sample_text(record, sample).plain.split("\n\n", 1)[1]
    marked = plain.removeprefix(PROMPT)
    assert re.sub(f"[{SUPERSCRIPTS}]", "", marked) == "".join(CONTINUATION)
    layers = ["" if token.head == "final" else SUPERSCRIPTS[token.exit_layer] for token in sample.tokens]
    runs = "".join(mark for mark, following in zip(layers, [*layers[1:], None], strict=True) if mark != following)
    assert "".join(char for char in marked if char in SUPERSCRIPTS) == runs
    assert [entry.split()[1] for entry in legend(record, sample).plain.split("   ")] == record.heads


def test_control_characters_cannot_reach_the_terminal(tmp_path):
    run_dir = write_example_run(tmp_path / "run")
    generation = json.loads((run_dir / "generations.jsonl").read_text().splitlines()[0])
    generation["prompt"] = "a\x1b[31mb\x07\r"
    generation["tokens"][0]["text"] = "[red]\x9b\u202e\t"
    (run_dir / "generations.jsonl").write_text(json.dumps(generation) + "\n")
    text = printed(run_dir)
    assert not set(text) & set("\x1b\x07\r\x9b\u202e")
    assert "[red]" in text
    assert visible("\x1b[2J\tx\n") == "\N{REPLACEMENT CHARACTER}[2J\tx\n"


def test_the_place_is_said_in_one_line_that_can_be_copied(tmp_path):
    run_dir = tmp_path / ("long-" * 30) / "run"
    (run_dir).mkdir(parents=True)
    assert printed(run_dir, width=60).strip() == f"Everything is in {run_dir}"
    (run_dir / "report.html").write_text("")
    assert location_line(run_dir).plain == f"Everything is in {run_dir} (open report.html)"


def test_several_policies_are_named(tmp_path):
    run_dir = write_example_run(tmp_path / "run")
    text = (run_dir / "speed_quality.csv").read_text()
    head, _, last = text.strip().rpartition("\n")
    (run_dir / "speed_quality.csv").write_text(f"{head}\n{last}\n{last.replace('max_probability', 'margin')}\n")
    lines = [cells(line) for line in printed(run_dir).splitlines()]
    assert [line[0] for line in lines if line[1:2] == ["0.9"]] == ["max_probability", "margin"]


@pytest.mark.parametrize(("layers", "num_layers"), [((2, 4, 6), 8), (tuple(range(1, 9)), 12)])
def test_several_modes_are_named_and_fit(layers, num_layers, tmp_path):
    run_dir = write_example_run(tmp_path / "run", layers, num_layers)
    lines = (run_dir / "speed_quality.csv").read_text().splitlines()
    drafts = [line.replace("catch_up", "self_speculative") for line in lines[2:]]
    (run_dir / "speed_quality.csv").write_text("\n".join([*lines, *drafts]) + "\n")
    text = printed(run_dir)
    assert "…" not in text
    assert all(len(line.rstrip()) <= 100 for line in text.splitlines() if str(run_dir) not in line)
    shown = [cells(line)[:2] for line in text.splitlines()]
    for mode in ("catch_up", "self_speculative"):
        assert [threshold for name, threshold in filter(lambda pair: pair[:1] == [mode], shown)] == list(map(str, THRESHOLDS))
    assert re.search(r"threshold [\d.]+, catch_up", text)
