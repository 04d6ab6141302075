"""One page of many runs: what differs between them first, what they share last. It needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd

from eellm.analysis import exit_table, metric_history, pareto_front, reliability, speed_quality
from eellm.analysis.runs import reason
from eellm.drawing.document import document
from eellm.drawing.inline_svg import inline_svg
from eellm.drawing.number_text import listing, plural
from eellm.drawing.page_style import SCRIPT
from eellm.drawing.plot import Plot
from eellm.metrics.names import FINAL, depth
from eellm.report import page_sample
from eellm.report.page_settings import settings_list
from eellm.report.run_record import RunRecord, load_run
from eellm.report.runs import figures, tables
from eellm.report.runs.compared import NUMBER, Compared, Line, lines, varying
from eellm.report.runs.key import key
from eellm.report.runs.seeds import over_seeds
from eellm.report.runs.style import SORT, STYLE

SPEED = "Speed against quality"
MOST_SAMPLES = 8
"""Runs of which a sample is shown."""
IMAGES = ("timeline.png", "gantt.png")
MOST_IMAGES = 4
MOST_NAMED_SETTINGS = 6


def runs_page(sources: str | Sequence[str], folder: Path) -> str:
    """The page of all runs in some folders, or of a wandb project. `folder`: where it will lie. Raises RunError without runs."""
    found = Compared.load(sources)
    runs = found.runs
    history, exits = metric_history(runs, figures.HISTORY), exit_table(runs)
    speeds, bins = speed_quality(runs), reliability(runs)
    records, unreadable = _records(runs)
    broken = [*found.broken, *(each for frame in (history, exits, speeds, bins) for each in frame.attrs["broken"]), *unreadable]
    heads = {FINAL, *exits["head"], *(head for _, record in records for head in record.heads)}
    by_task = [(str(task), own) for task, own in runs.groupby("task", sort=False)]
    title = f"{plural(len(runs), 'run')} of {sources if isinstance(sources, str) else listing(list(sources))}"
    sections = [
        _header(runs, len(found.broken), title),
        *(_differences(own, speeds, task, folder) for task, own in by_task),
        _failures(runs, list(dict.fromkeys(broken))),
        *(_curves(own, history, exits, task) for task, own in by_task),
        _speed(runs, speeds),
        _exits(runs, exits, bins),
        _samples(records, len(_generating(runs))),
        _timelines(runs),
        _shared(found),
    ]
    return document(title, "".join(sections), sorted(heads, key=depth), STYLE, SCRIPT + SORT)


def _header(runs: pd.DataFrame, broken: int, title: str) -> str:
    states = [f"{count} {state}" for state, count in runs["status"].value_counts().items()]
    facts = f"{listing(states)}." if states else ""
    facts += f" Not readable: {broken}." if broken else ""
    kicker = '<p class="kicker">eellm · report</p>'
    return f"<header>{kicker}<h1>{escape(title)}</h1><p>{escape(facts.strip())}</p></header>"


def _differences(runs: pd.DataFrame, speeds: pd.DataFrame, task: object, folder: Path) -> str:
    settings = varying(runs)
    words = f"{plural(len(runs), 'run')} of task={task}"
    if len(runs) > 1 and not settings:
        words += " with the same settings"
    elif settings:
        named = listing(settings[:MOST_NAMED_SETTINGS])
        more = len(settings) - MOST_NAMED_SETTINGS
        words += f" that differ in {named}" + (f" and {plural(more, 'more setting')}" if more > 0 else "")
    note = f'<p class="note">{escape(words)}.<span class="screen"> A click on a column sorts by it.</span></p>'
    found = f"{tables.runs_table(runs, folder)}{over_seeds(runs, speeds)}{tables.metrics_table(runs)}"
    return f"<h2>What differs: {escape(str(task))}</h2>{note}{found}"


def _failures(runs: pd.DataFrame, broken: Sequence[tuple[str, str]]) -> str:
    table = tables.failures_table(runs, broken)
    return f"<h2>Runs that did not end, and what cannot be read</h2>{table}" if table else ""


def _curves(runs: pd.DataFrame, history: pd.DataFrame, exits: pd.DataFrame, task: str) -> str:
    shown, words = lines(runs)
    plots = figures.loss_plots(history[history["run"].isin(runs["run"])], shown)
    depths = figures.depth_plot(exits[exits["run"].isin(runs["run"])], shown)
    return _drawn(f"Curves: {task}", words, shown, [*plots, *([depths] if depths else [])])


def _speed(runs: pd.DataFrame, rows: pd.DataFrame) -> str:
    numbers = _numbers(runs)
    if rows.empty:
        return ""
    every = tables.folded(f"All {len(rows)} settings of decoding", tables.speed_table(rows, numbers), len(rows))
    early = rows[rows["decoding"] != "full"]
    if not {"agreement", "speedup"} <= set(early.columns):
        return f"<h2>{SPEED}</h2>{every}"
    measured = runs[runs["run"].isin(rows["run"])]
    shown, _ = lines(measured)
    words = "Grey: runs that are not in the key." if len(measured) > sum(len(own.runs) for own in shown) else ""
    plot, front = figures.speed_plot(early, shown), pareto_front(early)
    drawn = _drawn(SPEED, words, shown, [plot]) if plot is not None else f"<h2>{SPEED}</h2>"
    best = f"<h3>The Pareto front</h3>{tables.speed_table(front, numbers)}" if len(front) else ""
    return f"{drawn}{best}<h3>All settings</h3>{every}"


def _exits(runs: pd.DataFrame, exits: pd.DataFrame, bins: pd.DataFrame) -> str:
    table = tables.exits_table(exits, _numbers(runs))
    if bins.empty:
        return f"<h2>The exits</h2>{table}" if table else ""
    shown, words = lines(runs[runs["run"].isin(bins["run"])])
    if any(len(own.runs) > 1 for own in shown):
        words = "Each line is the first run of a setting."
    words += " On the dotted line a head is right as often as its confidence says."
    return f"<h2>The exits</h2>{table}" + _drawn("Calibration", words, shown, figures.calibration_plots(bins, shown))


def _samples(records: Sequence[tuple[int, RunRecord]], count: int) -> str:
    """One prompt of each run, and below it how it continued the same prompt in other ways. `count`: of runs that have any."""
    if not records:
        return ""
    blocks = [
        f"<h3>Run {number} <small>{escape(record.run_dir.name)}</small></h3>{page_sample.samples(record, most_prompts=1)}"
        for number, record in records
    ]
    left = count - len(records)
    more = f'<p class="note">{plural(left, "more run")} with generations.</p>' if left > 0 else ""
    return f'<h2>What they write</h2><p class="note">{page_sample.NOTE}</p>{"".join(blocks)}{more}'


def _timelines(runs: pd.DataFrame) -> str:
    found = [(run[NUMBER], Path(run["run"]) / name) for run in runs.to_dict("records") for name in IMAGES]
    there = [(number, path) for number, path in found if path.is_file()]
    blocks = [
        f'<figure class="card"><h3>Run {number} <small>{escape(path.parent.name)}</small></h3>'
        f'<img alt="Gantt chart of run {number}" src="data:image/png;base64,{_base64(path)}"></figure>'
        for number, path in there[:MOST_IMAGES]
    ]
    left = len(there) - MOST_IMAGES
    more = f'<p class="note">{plural(left, "more timeline")} in the run directories.</p>' if left > 0 else ""
    return f"<h2>Timelines</h2>{''.join(blocks)}{more}" if blocks else ""


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _shared(found: Compared) -> str:
    if not found.shared:
        return ""
    words = "Settings that are the same in all runs"
    return f"<h2>What they share</h2><details><summary>{words}</summary>{settings_list(found.shared)}</details>"


def _drawn(title: str, words: str, shown: Sequence[Line], plots: Sequence[Plot]) -> str:
    if not plots:
        return ""
    boxes = [
        f'<figure class="card"><h3>{escape(plot.title)}</h3>{inline_svg(plot, [])}'
        f"{f'<figcaption>{escape(plot.caption)}</figcaption>' if plot.caption else ''}</figure>"
        for plot in plots
    ]
    note = (f'<p class="note">{escape(words)}</p>' if words else "") + key(shown)
    kind = "figures panels" if len(boxes) > 1 else "figures"
    return f'<h2>{escape(title)}</h2>{note}<div class="{kind}">{"".join(boxes)}</div>'


def _records(runs: pd.DataFrame) -> tuple[list[tuple[int, RunRecord]], list[tuple[str, str]]]:
    """Number and record of the first runs that have generated text, and those of them that cannot be read, as (path, reason)."""
    records: list[tuple[int, RunRecord]] = []
    broken: list[tuple[str, str]] = []
    for number, path in _generating(runs)[:MOST_SAMPLES]:
        try:
            records.append((int(number), load_run(path)))
        except (OSError, ValueError) as error:
            broken.append((str(path), reason(error)))
    return records, broken


def _generating(runs: pd.DataFrame) -> list[tuple[int, Path]]:
    paths = [(number, Path(run)) for run, number in _numbers(runs).items()]
    return [(number, path) for number, path in paths if (path / "generations.jsonl").is_file()]


def _numbers(runs: pd.DataFrame) -> dict[str, int]:
    return dict(zip(runs["run"], runs[NUMBER], strict=True))
