import json
import re
import subprocess
import sys

import pytest

from eellm.metrics.tables import read_table
from eellm.report.html import build_report
from tests.report.example_run import CONTINUATION, PROMPT, THRESHOLDS, write_example_run
from tests.report.page_reader import read_page

FILES = [
    "config.yaml", "status.json", "metrics.jsonl", "exits.csv", "trade_off.csv", "speed_quality.csv", "reliability.csv",
    "generations.jsonl",
]  # fmt: skip
HEADINGS = {
    "Learning": {"metrics.jsonl"},
    "The exits": {"exits.csv", "metrics.jsonl", "reliability.csv"},
    "Speed against quality": {"speed_quality.csv"},
    "Thresholds on held-out text": {"trade_off.csv"},
    "What it writes": {"generations.jsonl"},
    "Settings": {"config.yaml"},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_example_run(tmp_path_factory.mktemp("run") / "example")


@pytest.fixture(scope="module")
def page(run_dir):
    return build_report(run_dir).read_text(encoding="utf-8")


def rows_under(root, heading):
    """Texts of the cells of the first table after a heading."""
    order = root.all()
    start = next(index for index, element in enumerate(order) if element.tag == "h2" and element.text == heading)
    table = next(element for element in order[start:] if element.tag == "table")
    return [[cell.text for cell in row.children] for row in table.all("tr")]


def test_nothing_outside_the_page_is_needed(page):
    root = read_page(page)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert not root.all("link")
    assert not root.all("img")
    assert not root.all("iframe")
    assert re.findall(r"url\((?!#)", page) == []
    for element in root.all():
        assert "src" not in element.attributes
        assert element.attributes.get("href", "#").startswith("#")


def test_references_inside_figures_are_unique(page):
    root = read_page(page)
    ids = [element.attributes["id"] for element in root.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", page)) | set(re.findall(r'href="#([^"]*)"', page))
    assert used <= set(ids)


def test_every_head_and_threshold_is_in_its_table(run_dir, page):
    root = read_page(page)
    header, *rows = rows_under(root, "The exits")
    assert header[:3] == ["head", "after layer", "loss"]
    expected = [[str(row["head"]), str(row["layer"]), f"{row['loss']:.3f}"] for row in read_table(run_dir / "exits.csv")]
    assert [row[:3] for row in rows] == expected
    header, *rows = rows_under(root, "Speed against quality")
    assert header[-4:] == ["exit_02", "exit_04", "exit_06", "final"]
    assert [row[0] for row in rows] == ["full depth", *map(str, THRESHOLDS)]
    speeds = [f"{row['tokens_per_second']:.1f}" for row in read_table(run_dir / "speed_quality.csv")]
    assert [row[1] for row in rows] == speeds
    header, *rows = rows_under(root, "Thresholds on held-out text")
    assert [row[0] for row in rows] == list(map(str, THRESHOLDS))


def test_generated_text_is_text(page):
    root = read_page(page)
    assert len(root.all("script")) == 1
    shown = [element.text for element in root.all("div", "text")]
    assert shown == [PROMPT + "".join(CONTINUATION)] * 3


def test_a_token_carries_what_hover_shows(run_dir, page):
    tokens = read_page(page).all("span", "token")
    lines = [json.loads(line) for line in (run_dir / "generations.jsonl").read_text().splitlines()]
    confidences = {f"{token['confidence']:.3f}" for line in lines for token in line["tokens"] if token["text"].strip("\n")}
    assert {token.attributes["data-confidence"] for token in tokens} == confidences
    layers = {(token.attributes["data-head"], token.attributes["data-layer"]) for token in tokens}
    assert layers == {("exit_02", "2"), ("exit_04", "4"), ("exit_06", "6"), ("final", "8")}


def test_hostile_names_and_texts_stay_text(tmp_path):
    run_dir = write_example_run(tmp_path / "run")
    hostile = '"><script>alert(1)</script><b x="'
    config = json.loads((run_dir / "config.yaml").read_text())
    config["name"] = config["data"]["path"] = hostile
    (run_dir / "config.yaml").write_text(json.dumps(config))
    generation = json.loads((run_dir / "generations.jsonl").read_text().splitlines()[0])
    generation["prompt"] = hostile
    generation["tokens"] = [{**generation["tokens"][0], "text": "</span></div>"}, {**generation["tokens"][0], "text": "&lt;"}]
    (run_dir / "generations.jsonl").write_text(json.dumps(generation) + "\n")
    root = read_page(build_report(run_dir).read_text(encoding="utf-8"))
    assert len(root.all("script")) == 1
    assert [element.text for element in root.all("div", "text")] == [hostile + "</span></div>&lt;"]


@pytest.mark.parametrize(
    "kept", [[], *[[name] for name in FILES], FILES[:3], FILES[3:]], ids=lambda kept: "+".join(kept) or "nothing"
)
def test_what_is_missing_is_left_out(tmp_path, kept):
    run_dir = write_example_run(tmp_path / "run")
    for name in set(FILES) - set(kept):
        (run_dir / name).unlink()
    root = read_page(build_report(run_dir).read_text(encoding="utf-8"))
    headings = {element.text for element in root.all("h2")}
    for heading, sources in HEADINGS.items():
        assert (heading in headings) == bool(sources & set(kept)), heading


def test_a_config_of_another_version_costs_only_the_model(tmp_path):
    run_dir = write_example_run(tmp_path / "run")
    config = json.loads((run_dir / "config.yaml").read_text())
    config["model"]["from_the_future"] = 1
    (run_dir / "config.yaml").write_text(json.dumps(config))
    root = read_page(build_report(run_dir).read_text(encoding="utf-8"))
    headings = {element.text for element in root.all("h2")}
    assert "The model" not in headings
    assert {"The exits", "Settings"} <= headings


def test_the_model_is_drawn_by_stage(page):
    stages = read_page(page).all("div", "stage")
    assert [[part.text for part in stage.all("span") if part.classes] for stage in stages] == [
        ["embedding", "1", "2", "exit_02", "3", "4", "exit_04"],
        ["5", "6", "exit_06", "7", "8", "final"],
    ]


def test_a_run_that_diverged_still_gets_its_page(tmp_path):
    run_dir = write_example_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows[10:]:
        row.update({key: "NaN" for key in row if "loss" in key})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exits = (run_dir / "exits.csv").read_text().splitlines()
    (run_dir / "exits.csv").write_text(
        "\n".join([exits[0], *("exit_02,2,NaN,NaN,0.1,0.5,NaN", "final,8,inf,inf,0.1,1.0,NaN")]) + "\n"
    )
    root = read_page(build_report(run_dir).read_text(encoding="utf-8"))
    assert rows_under(root, "The exits")[1][:3] == ["exit_02", "2", "nan"]


def test_both_themes_colour_every_head(page):
    light, dark = page.split("@media screen and (prefers-color-scheme: dark)")[:2]
    for head in ("exit-02", "exit-04", "exit-06", "final"):
        colours = {re.search(rf"--{head}:(#[0-9a-f]{{6}})", theme).group(1) for theme in (light, dark)}
        assert len(colours) == 2
    assert "#fe" not in page.lower().split("<main>")[1].split("<script>")[0]


def test_reports_and_metrics_leave_torch_and_pyplot_alone(run_dir):
    code = (
        "import sys; from pathlib import Path\n"
        "import eellm.metrics.recorder, eellm.metrics.flops, eellm.metrics.speed, eellm.report.terminal\n"
        "from eellm.report.html import build_report\n"
        "build_report(Path(sys.argv[1]))\n"
        "print([name for name in ('torch', 'matplotlib.pyplot', 'wandb', 'megatron', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
