"""The page of many runs says what the runs' files say, in the order in which one asks for it."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from eellm.analysis import metric_history
from eellm.config.compose import compose
from eellm.drawing.number_text import MISSING
from eellm.drawing.palette import paper_ink
from eellm.errors import ConfigError, RunError
from eellm.report.runs.compared import Compared, lines, short_names
from eellm.report.runs.figures import loss_plots, speed_plot
from eellm.report.runs.page import runs_page
from eellm.tasks import report
from eellm.tasks.context import TaskContext
from tests.analysis.run_folders import write_run
from tests.report.example_run import write_example_run
from tests.report.page_reader import read_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WEIGHTS, SEEDS = (0.1, 0.5, 1.0), (1, 2, 3)
FRONT = [(0.9, 0.95), (1.2, 0.9), (1.5, 0.6)]
BEATEN = [(0.8, 0.9), (1.2, 0.7)]
FURTHER = ["generate/speedup", "generate/agreement", "generate/mean_layers", "train/tokens_per_second", "train/step_time"]
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def loss(weight, seed, step=100):
    return 4 + weight / 10 + seed / 1000 + 1 / step


def write_trained(path, weight, seed, speeds=()):
    history = [
        {"step": step, "time": 1.0 * step, "val/loss/exit_02": 5.0, "val/loss/final": loss(weight, seed, step)}
        for step in (1, 10, 100)
    ]
    full = {
        "decoding": "full",
        "threshold": None,
        "tokens_per_second": 100.0,
        "speedup": 1.0,
        "agreement": 1.0,
        "mean_layers": 8.0,
    }
    early = [
        {
            "decoding": "catch_up",
            "threshold": 0.5,
            "tokens_per_second": 100 * speed,
            "speedup": speed,
            "agreement": agreement,
            "mean_layers": 4.0,
        }
        for speed, agreement in speeds
    ]
    settings = {"loss_weights.values": weight, "seed": seed}
    tables = {"speed_quality": [full, *early]} if speeds else {}
    final = {"val/loss/final": loss(weight, seed), "train/lr": 0.0, **dict.fromkeys(FURTHER, 0.5)}
    return write_run(path, settings, final, history, tables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three weights with three seeds each; the last failed, and one directory is no run any more."""
    root = tmp_path_factory.mktemp("study")
    for number, (weight, seed) in enumerate((weight, seed) for weight in WEIGHTS for seed in SEEDS):
        write_trained(root / f"{number}", weight, seed, {0: FRONT, 4: BEATEN}.get(number, ()))
    status = {"state": "failed", "error": "loss of exit_02 is NaN <at step 3>", "started": 1.0, "updated": 2.0}
    (root / "8" / "status.json").write_text(json.dumps(status))
    (root / "8" / "metrics.json").unlink()
    (root / "broken").mkdir()
    (root / "broken" / "status.json").write_text('{"sta')
    return root


@pytest.fixture(scope="module")
def page(folder):
    return runs_page(str(folder), folder)


def tables_under(root, heading):
    """Texts of the cells of the tables between a heading and the next of its kind."""
    order = root.all()
    start = next(index for index, element in enumerate(order) if element.tag == "h2" and element.text == heading)
    end = next((index for index in range(start + 1, len(order)) if order[index].tag == "h2"), len(order))
    tables = [element for element in order[start:end] if element.tag == "table"]
    return [
        [[cell.text.replace("\N{NO-BREAK SPACE}", " ") for cell in row.children] for row in table.all("tr")] for table in tables
    ]


def test_what_differs_comes_first_and_what_is_shared_last(page):
    headings = [element.text for element in read_page(page).all("h2")]
    assert headings == [
        "What differs: train",
        "Runs that did not end, and what cannot be read",
        "Curves: train",
        "Speed against quality",
        "The exits",
        "What they share",
    ]


def test_the_first_table_has_what_differs_and_how_runs_ended(page):
    runs, seeds, others = tables_under(read_page(page), "What differs: train")
    header, *rows = runs
    assert header == ["run", "state", "seed", "loss_weights.values", "val/loss/final", *FURTHER, "seconds"]
    expected = [[f"{seed}", f"{weight:g}", f"{loss(weight, seed):.3f}"] for weight in WEIGHTS for seed in SEEDS]
    assert [row[2:5] for row in rows[:-1]] == expected[:-1]
    assert rows[-1][1:5] == ["failed", "3", "1", MISSING]
    assert others == [["run", "train/lr"], *([str(number), "0.000"] for number in range(1, 9)), ["9", MISSING]]
    means = [[loss(weight, seed) for seed in SEEDS[: 2 if weight == 1.0 else 3]] for weight in WEIGHTS]
    expected = [f"{statistics.mean(own):.3f} {PLUS_MINUS} {statistics.stdev(own):.3f}" for own in means]
    losses = [row for row in seeds[1:] if row[0] == "val/loss/final"]
    assert [row[2] for row in losses] == expected
    assert [row[3:] for row in losses] == [
        [MISSING, MISSING, MISSING, "3"],
        ["+0.040 (+0.040 to +0.040)", "no", "3", "3"],
        ["+0.090 (+0.090 to +0.090)", "no", "2", "2"],
    ]


def test_speed_over_seeds_is_that_of_one_threshold_and_compared_by_pairs(tmp_path):
    """Seeds differ by more than the settings do; every run's fastest threshold is another one."""
    speeds = {0.1: {1: (1.0, 3.0), 2: (4.0, 2.0), 3: (7.0, 1.0)}, 1.0: {1: (1.1, 3.5), 2: (4.2, 1.6), 3: (7.3, 1.0)}}
    for weight, of_seed in speeds.items():
        for seed, own in of_seed.items():
            rows = [
                {"decoding": "catch_up", "threshold": limit, "speedup": speed, "agreement": 0.9}
                for limit, speed in zip((0.4, 0.8), own, strict=True)
            ]
            settings = {"loss_weights.values": weight, "seed": seed}
            write_run(tmp_path / f"{weight}_{seed}", settings, {"generate/speedup": max(own)}, tables={"speed_quality": rows})
    _, seeds = tables_under(read_page(runs_page(str(tmp_path), tmp_path)), "What differs: train")
    found = {(row[0], row[1]): row[2:] for row in seeds[1:]}
    assert list(found) == [
        (f"{measure}, catch_up at {limit}", weight)
        for limit in ("0.4", "0.8")
        for measure in ("speedup", "agreement")
        for weight in ("0.1", "1")
    ]
    gap, half = 0.2, 4.3027 * 0.1 / 3**0.5
    interval = f"({gap - half:+.3f} to {gap + half:+.3f})"
    assert found["speedup, catch_up at 0.4", "0.1"][0] == f"4.000 {PLUS_MINUS} 3.000"
    assert found["speedup, catch_up at 0.4", "1"] == [f"4.200 {PLUS_MINUS} 3.100", f"+0.200 {interval}", "yes", "3", "3"]
    assert found["speedup, catch_up at 0.8", "1"][2] == "yes"


def test_seeds_without_partners_are_not_compared(tmp_path):
    for number, (weight, seed) in enumerate([(0.1, 1), (0.1, 2), (1, 3), (1, 4), (2, 1), (2, 1)]):
        write_trained(tmp_path / f"{number}", weight, seed)
    _, seeds, _ = tables_under(read_page(runs_page(str(tmp_path), tmp_path)), "What differs: train")
    assert [row[3:] for row in seeds[1:]] == [[MISSING, MISSING, MISSING, "2"]] * 3


def test_decodings_of_different_runs_are_compared_at_one_threshold(tmp_path):
    for mode, speed in (("catch_up", 1.5), ("pipeline", 1.2)):
        for seed in (1, 2):
            rows = [{"decoding": mode, "threshold": 0.4, "speedup": speed + 0.3 * seed, "agreement": 1.0}]
            write_run(tmp_path / f"{mode}{seed}", {"decoding": {"mode": mode}, "seed": seed}, tables={"speed_quality": rows})
    _, seeds = tables_under(read_page(runs_page(str(tmp_path), tmp_path)), "What differs: train")
    assert [row[:2] for row in seeds[1:3]] == [["speedup at 0.4", "catch_up"], ["speedup at 0.4", "pipeline"]]
    assert seeds[2][3:] == ["-0.300 (-0.300 to -0.300)", "no", "2", "2"]


def test_settings_are_called_by_the_shortest_name_that_is_theirs_alone():
    keys = ["seed", "exits.layers", "tuning.layers", "loss_weights.values", "a.x.rate", "b.x.rate", "b.rate"]
    assert short_names(keys, keys) == {
        **{name: name for name in keys},
        "b.rate": "b.rate",
    }
    assert short_names(["tuning.distillation.weight", "a.x.rate"], [*keys[:4], "a.x.rate", "tuning.distillation.weight"]) == {
        "tuning.distillation.weight": "distillation.weight",
        "a.x.rate": "x.rate",
    }


def test_runs_stand_in_the_order_of_their_settings(tmp_path):
    for number, (weight, layers) in enumerate([(1, [10]), (0.1, [10]), (0.5, [10]), (0.1, [2, 4]), (None, [2])]):
        write_run(tmp_path / f"{number}", {"loss_weights.values": weight, "exits.layers": layers})
    runs = Compared.load(str(tmp_path)).runs
    assert [Path(run).name for run in runs["run"]] == ["4", "3", "1", "2", "0"]
    assert [line.label for line in lines(runs)[0]][1] == "2: exits.layers=[2,4], loss_weights.values=0.1"


def test_failed_and_broken_runs_are_named_with_their_reason(folder, page):
    (table,) = tables_under(read_page(page), "Runs that did not end, and what cannot be read")
    failed, broken = table[1:]
    assert failed == ["9", "failed", str(folder / "8"), "loss of exit_02 is NaN <at step 3>"]
    assert broken[:3] == [MISSING, "not readable", str(folder / "broken")]
    assert "status.json is not JSON" in broken[3]


def test_the_pareto_front_is_of_all_runs(page):
    front, every = tables_under(read_page(page), "Speed against quality")
    assert [(float(row[4]), row[5]) for row in front[1:]] == [(speed, f"{100 * agreement:.1f}%") for speed, agreement in FRONT]
    assert {row[0] for row in front[1:]} == {"1"}
    assert len(every) - 1 == 2 + len(FRONT) + len(BEATEN)


def test_what_is_shared_stands_in_the_last_list(page):
    root = read_page(page)
    entries = {row.children[0].text: row.children[1].text for row in root.all("div", "settings")[0].all("div") if row.children}
    assert entries["num_layers"] == "8"
    assert not {"values", "seed"} & set(entries)


def test_nothing_outside_the_page_is_needed(page):
    root = read_page(page)
    assert re.findall(r"https?:", page) == []
    assert not [element for element in root.all() if element.tag in ("link", "iframe") or "src" in element.attributes]
    ids = [element.attributes["id"] for element in root.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine: the page was not tried in a browser")
def test_in_a_browser_tables_sort_and_nothing_sticks_out(page, tmp_path):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    said = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        tab = browser.new_page(viewport={"width": 400, "height": 800})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto((tmp_path / "report.html").as_uri())
        for media, width in (("screen", 400), ("screen", 1600), ("print", 718)):  # A4 less its margins
            tab.emulate_media(media=media)
            tab.set_viewport_size({"width": width, "height": 800})
            assert tab.evaluate("document.documentElement.scrollWidth") == width, media
        tab.emulate_media(media="screen")
        table = tab.locator("table.sortable").first
        head = table.get_by_role("button", name="val/loss/final")
        first = table.locator("tbody tr td:first-child")
        head.click()
        assert [text.split()[0] for text in first.all_inner_texts()] == list("123456789")
        head.click()
        assert [text.split()[0] for text in first.all_inner_texts()] == list("876543219")  # the failed run has no loss: last
        browser.close()
    assert said == []


def drawn(plot):
    axes = plot.figure(paper_ink([])).axes[0]
    return {round(line.get_ydata()[-1], 6) for line in axes.lines if len(line.get_xdata())}


def test_few_runs_are_drawn_each_and_many_by_the_mean_over_seeds(folder):
    runs = Compared.load(str(folder)).runs
    few, _ = lines(runs.head(3))
    assert [line.runs for line in few] == [(str(folder / name),) for name in "012"]
    assert [line.label for line in few] == ["1: seed=1", "2: seed=2", "3: seed=3"]
    many, words = lines(runs)
    assert [line.runs for line in many] == [tuple(str(folder / f"{3 * group + seed}") for seed in range(3)) for group in range(3)]
    assert [line.label for line in many] == [f"loss_weights.values={weight:g}" for weight in WEIGHTS]
    assert "mean" in words
    final = next(plot for plot in loss_plots(metric_history(runs), many) if plot.title.endswith("final"))
    assert drawn(final) == {round(statistics.mean(loss(weight, seed) for seed in SEEDS), 6) for weight in WEIGHTS}


def test_of_too_many_settings_the_best_are_drawn_and_a_band_of_all(tmp_path):
    for number in range(12):
        write_trained(tmp_path / f"{number:02}", number / 10, 1)
    runs = Compared.load(str(tmp_path)).runs
    best, words = lines(runs)
    assert [line.runs for line in best] == [(str(tmp_path / f"{number:02}"),) for number in range(8)]
    assert "lowest" in words
    final = next(plot for plot in loss_plots(metric_history(runs), best) if plot.title.endswith("final"))
    (band,) = final.figure(paper_ink([])).axes[0].collections
    heights = [y for x, y in band.get_paths()[0].vertices if x == 100]
    assert (min(heights), max(heights)) == pytest.approx((loss(0, 1), loss(1.1, 1)))


def test_runs_without_speeds_have_no_speed_figure(folder):
    runs = Compared.load(str(folder)).runs
    empty = runs.head(0).assign(agreement=[], speedup=[])
    assert speed_plot(empty, lines(runs)[0]) is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "exits.csv", "speed_quality.csv", "reliability.csv", "generations.jsonl"])
def test_a_run_with_one_broken_file_is_named_and_the_page_made(tmp_path, name):
    for run in ("good", "bad"):
        write_run(tmp_path / run, {"seed": 1 if run == "good" else 2}, {"val/loss/final": 1.0})
    (tmp_path / "bad" / name).write_text("a,b\n1,2,3\n" if name.endswith("csv") else "[1]\n")
    (table,) = tables_under(read_page(runs_page(str(tmp_path), tmp_path)), "Runs that did not end, and what cannot be read")
    assert [row[:3] for row in table[1:]] == [[MISSING, "not readable", str(tmp_path / "bad")]]
    assert table[1][3].startswith(name)


def test_hostile_settings_and_texts_stay_text(tmp_path):
    hostile = '"><script>alert(1)</script>'
    write_run(tmp_path / "a", {"data.path": hostile}, {"val/loss/final": 1.0})
    write_example_run(tmp_path / "b")
    generation = json.loads((tmp_path / "b" / "generations.jsonl").read_text().splitlines()[0])
    (tmp_path / "b" / "generations.jsonl").write_text(json.dumps({**generation, "prompt": hostile}) + "\n")
    root = read_page(runs_page([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path))
    assert len(root.all("script")) == 1
    assert hostile in root.text


def test_a_hundred_runs_make_a_small_page(tmp_path):
    for number in range(100):
        write_trained(tmp_path / f"{number:03}", number / 10, 1, FRONT)
    assert len(runs_page(str(tmp_path), tmp_path).encode()) < 1_000_000


def test_the_task_writes_the_page_and_leaves_its_own_runs_out(tmp_path):
    write_trained(tmp_path / "runs" / "a", 0.1, 1)
    write_run(tmp_path / "runs" / "earlier", {"task.name": "report"})
    config = compose(["task=report", f"report.runs={tmp_path / 'runs'}"])
    report.run(TaskContext(config, tmp_path / "runs"))
    root = read_page((tmp_path / "runs" / "report.html").read_text(encoding="utf-8"))
    assert root.all("h1")[0].text.startswith("1 run of")
    with pytest.raises(RunError, match=r"earlier: .*task=report"):
        runs_page(str(tmp_path / "runs" / "earlier"), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["report.runs=null", "report.runs=outputs"]),
        (["report.runs=nowhere"], ["report.runs=nowhere", "no such folder"]),
        (["report.runs=conf", "report.output=conf"], ["report.output=conf: is a folder"]),
        (["report.runs=conf", "report.output=nowhere/report.html"], ["report.output=nowhere/report.html", "no folder nowhere"]),
    ],
)
def test_what_cannot_be_done_is_said_before_it_starts(overrides, words, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    with pytest.raises(ConfigError) as raised:
        compose(["task=report", *overrides])
    for word in words:
        assert word in str(raised.value)
