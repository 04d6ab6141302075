"""report.html: a run on one page that needs nothing but itself, made from the run directory. What is missing is left out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from eellm.drawing.document import document
from eellm.drawing.inline_svg import inline_svg
from eellm.drawing.number_text import TIMES, count, fixed, percent
from eellm.drawing.plot import Plot
from eellm.metrics.names import FINAL, TOKENS_PER_SECOND
from eellm.report import page_sample, page_tables
from eellm.report.figures import plots, save_figures
from eellm.report.page_settings import leaves, settings_list
from eellm.report.run_record import RunRecord, load_run
from eellm.report.setup import Setup, read_setup
from eellm.report.words import (
    exit_words,
    layout_words,
    outlook_words,
    run_words,
    setting_words,
    setup_words,
    speed_words,
    title_words,
    validation_words,
)

LEARNING = ("loss_train", "loss_validation")
EXITS = ("exit_gap", "reliability")
SPEED = ("speed_quality", "shares")
DEPTH = ("trade_off",)
TASKS = ("lm_eval",)
FILES = {
    "metrics.jsonl": "every logged value, one JSON object a line",
    "metrics.json": "the final values",
    "config.yaml": "all settings of the run",
    "exits.csv": "the table of exits",
    "trade_off.csv": "thresholds on held-out text",
    "speed_quality.csv": "speed against quality",
    "lm_eval.csv": "tasks of lm-evaluation-harness",
    "generations.jsonl": "generated texts, token by token",
    "checkpoints": "weights and optimizer state",
    "figures": "the figures as PNG and SVG files",
}


def build_report(run_dir: Path) -> Path:
    """Write `report.html`, and the figures as PNG and SVG under `figures/`, from what a run directory holds."""
    record = load_run(run_dir)
    save_figures(record, run_dir / "figures")
    path = run_dir / "report.html"
    replacement = path.with_name(path.name + ".tmp")
    replacement.write_text(page(record), encoding="utf-8")
    os.replace(replacement, path)
    return path


def page(record: RunRecord) -> str:
    """The whole document."""
    setup = read_setup(record)
    drawn = {plot.name: plot for plot in plots(record)}
    sections = [
        _header(record, setup),
        _tiles(record),
        _in_short(record, setup),
        _exits(record, [drawn[name] for name in EXITS if name in drawn]),
        _speed(record, [drawn[name] for name in SPEED if name in drawn]),
        _tasks(record, [drawn[name] for name in TASKS if name in drawn]),
        _samples(record),
        _held_out(record, [drawn[name] for name in DEPTH if name in drawn]),
        _figure_section(record, "Learning", [drawn[name] for name in LEARNING if name in drawn]),
        _model(setup),
        _settings(record.config),
        _footer(record),
    ]
    return document(f"{_name(record)}: eellm report", "".join(sections), record.heads or [FINAL])


def _name(record: RunRecord) -> str:
    return str(record.config.get("name") or record.run_dir.name)


def _header(record: RunRecord, setup: Setup | None) -> str:
    task = record.config.get("task")
    kind = [str(task["name"])] if isinstance(task, Mapping) and "name" in task else []
    kicker = " · ".join(["eellm", *kind, _name(record), record.run_dir.name])
    title = title_words(setup) if setup is not None else _name(record)
    lines = [f'<p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>']
    facts = run_words(record, setup)
    if setup is not None:
        lines.append(f"<p>{escape(setup_words(setup))}</p>")
        facts = " ".join(part for part in (layout_words(setup), f"{facts}." if facts else "") if part)
    if facts:
        lines.append(f"<p>{escape(facts)}</p>")
    return f"<header>{''.join(lines)}</header>"


def _tiles(record: RunRecord) -> str:
    """The few numbers that a reader looks for first."""
    rows = {str(row["head"]): row for row in record.exits}
    tiles = []
    if FINAL in rows:
        tiles.append((fixed(rows[FINAL].get("loss")), "loss of the final head, nats per token"))
    exits = [head for head in record.heads if head in rows and head != FINAL]
    if exits:
        tiles.append((fixed(rows[exits[0]].get("loss")), f"loss of the first exit, {exits[0]}"))
        tiles.append((percent(rows[exits[0]].get("agreement")), f"of positions where {exits[0]} and final agree"))
    rated = [row for row in record.early_exit if isinstance(row.get("speedup"), (int, float))]
    if rated:
        best = max(rated, key=lambda row: float(str(row["speedup"])))
        same = f", {percent(best['agreement'])} of tokens the same" if best.get("agreement") is not None else ""
        tiles.append(
            (f"{fixed(best['speedup'], 2)}{TIMES}", f"speed of full depth at threshold {setting_words(best, record)}{same}")
        )
    speeds = record.curve(TOKENS_PER_SECOND).values
    if speeds:
        tiles.append((count(sorted(speeds)[len(speeds) // 2]), "training tokens per second (median)"))
    boxes = "".join(f'<div class="tile"><b>{escape(number)}</b><span>{escape(label)}</span></div>' for number, label in tiles)
    return f'<div class="tiles">{boxes}</div>' if tiles else ""


def _in_short(record: RunRecord, setup: Setup | None) -> str:
    parts = [
        ("How far the exits differ", exit_words(record) or validation_words(record)),
        ("Whether early exit pays", speed_words(record, setup)),
        ("What a real run needs", outlook_words(record, setup)),
    ]
    columns = "".join(f"<div><h2>{title}</h2><p>{escape(' '.join(words))}</p></div>" for title, words in parts if words)
    return f'<div class="words">{columns}</div>' if columns else ""


def _exits(record: RunRecord, figures: list[Plot]) -> str:
    if not record.exits:
        return _figure_section(record, "The exits", figures)
    note = (
        "Every head on the same held-out text. Agreement: how often its most probable token is the final head's. "
        "Calibration error: how far its confidence is from how often it is right, 0 at best."
    )
    return f'<h2>The exits</h2><p class="note">{note}</p>{page_tables.exits_table(record)}{_figures(record, figures)}'


def _speed(record: RunRecord, figures: list[Plot]) -> str:
    if not record.speed_quality:
        return _figure_section(record, "Where tokens leave", figures)
    note = (
        "Generated text, one sequence at a time. Same as full depth: how often the same token is emitted after the same text. "
        "Mean layers: how many a token has passed when it is emitted. The last columns: the share of tokens that each head emits."
    )
    return f'<h2>Speed against quality</h2><p class="note">{note}</p>{page_tables.speed_table(record)}{_figures(record, figures)}'


def _tasks(record: RunRecord, figures: list[Plot]) -> str:
    if not record.lm_eval:
        return ""
    note = (
        "Scores with one standard error. A text's likelihood is taken from the head that the threshold lets speak at each of its "
        "tokens. Speedup: of decoding in the same setting, one text at a time. Cut: requests longer than the model was trained "
        "for, that lost their beginning."
    )
    table = page_tables.tasks_table(record)
    return f'<h2>Tasks of lm-evaluation-harness</h2><p class="note">{note}</p>{table}{_figures(record, figures)}'


def _held_out(record: RunRecord, figures: list[Plot]) -> str:
    if not record.trade_off:
        return _figure_section(record, "Confidence", figures)
    note = (
        "Held-out text, each token predicted from the true text before it and leaving at the first exit that is confident enough."
    )
    table = page_tables.trade_off_table(record)
    return f'<h2>Thresholds on held-out text</h2><p class="note">{note}</p>{table}{_figures(record, figures)}'


def _samples(record: RunRecord) -> str:
    if not record.generations:
        return ""
    return f'<h2>What it writes</h2><p class="note">{page_sample.NOTE}</p>{page_sample.samples(record)}'


def _figure_section(record: RunRecord, title: str, figures: list[Plot]) -> str:
    return f"<h2>{title}</h2>{_figures(record, figures)}" if figures else ""


def _figures(record: RunRecord, figures: list[Plot]) -> str:
    boxes = [
        f'<figure class="card"><h3>{escape(plot.title)}</h3>{inline_svg(plot, record.heads)}'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot in figures
    ]
    return f'<div class="figures">{"".join(boxes)}</div>' if boxes else ""


def _model(setup: Setup | None) -> str:
    """The network as a row of layers with its heads, cut into pipeline stages."""
    if setup is None:
        return ""
    boxes = []
    for stage in setup.stages:
        parts = ['<span class="part">embedding</span>'] if stage.has_embedding else []
        for segment in stage.segments:
            parts += [f'<span class="layer">{layer}</span>' for layer in segment.layers]
            if segment.exit is not None:
                parts.append(_head(segment.exit.name))
        if stage.has_final_head:
            parts.append(_head(FINAL))
        title = f"stage {stage.index}, pipeline rank {setup.layout.pp_rank_of(stage.index)}"
        label = f"<span>{title}</span>" if len(setup.stages) > 1 else ""
        boxes.append(f'<div class="stage">{label}<div class="layers">{"".join(parts)}</div></div>')
    note = f'<p class="note">{escape(layout_words(setup))}</p>'
    return f'<h2>The model</h2>{note}<div class="model">{"".join(boxes)}</div>'


def _head(head: str) -> str:
    return f'<span class="head" style="{page_tables.colour(head)}">{escape(head)}</span>'


def _settings(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    return f"<h2>Settings</h2><details><summary>All settings</summary>{settings_list(leaves(config))}</details>"


def _footer(record: RunRecord) -> str:
    found = [f"<code>{name}</code> {text}" for name, text in FILES.items() if (record.run_dir / name).exists()]
    listing = f" Beside this page: {'; '.join(found)}." if found else ""
    return f"<footer>Written by eellm from the run directory.{listing}</footer>"
