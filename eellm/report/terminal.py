"""What a run shows in the terminal when it ends: two tables, what they say, a coloured sample, where everything is."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from eellm.drawing.number_text import MISSING, fixed, percent, perplexity, threshold, with_error
from eellm.drawing.palette import exit_colours
from eellm.metrics.names import FINAL, share_column
from eellm.metrics.tables import Cell, read_table
from eellm.report.run_record import SHARE, Generation, RunRecord, TableRows, load_run
from eellm.report.setup import read_setup
from eellm.report.words import summary_words

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
MOST_SHARE_COLUMNS = 9
"""Heads whose shares fit beside the other columns at 100 characters; with more, they get a table of their own."""
READING_WIDTH = 96
EXITS_NOTE = "agreement: same most probable token as the final head; calib. error: expected, 0 is perfect"
MOST_TASK_ROWS = 60
TASKS_NOTE = "score: with its standard error; layers: mean per scored or generated token; speedup: of decoding, not of scoring"
SPEED_NOTE = "same: full depth's token, given the same text; layers: mean per token; rest: % of tokens by exit"


def print_report(run_dir: Path, console: Console | None = None) -> None:
    """Print what a run directory holds; parts that are missing are left out."""
    console = console or Console()
    record = load_run(run_dir)
    if record.exits:
        console.print(exits_table(record))
        console.print(EXITS_NOTE, style="dim")
        console.print()
    print_speed(record, console)
    if record.lm_eval:
        console.print(tasks_table(record))
        console.print(TASKS_NOTE, style="dim")
        console.print()
    for paragraph in summary_words(record, read_setup(record)):
        console.print(Text(paragraph), width=min(READING_WIDTH, console.width))
        console.print()
    sample = chosen_sample(record)
    if sample is not None:
        console.print(sample_text(record, sample))
        console.print()
        console.print(legend(record, sample))
        console.print()
    console.print(location_line(run_dir), soft_wrap=True)


def print_address(address: str, model: str, run_dir: Path) -> None:
    """Where a server listens; at once, also into a file."""
    print(
        f"{model} is served at {address} (page), {address}/v1 (API); Ctrl-C ends it. Log: {run_dir / 'access.jsonl'}", flush=True
    )


def print_speed(record: RunRecord, console: Console) -> None:
    """The tables of speed against quality, if there are any."""
    if record.speed_quality:
        for table in speed_tables(record):
            console.print(table)
        console.print(SPEED_NOTE, style="dim")
        console.print()


def print_tuning(run_dir: Path, console: Console | None = None) -> None:
    """Print every head before and after tuning, as far as they were evaluated."""
    console, record = console or Console(), load_run(run_dir)
    before = read_table(run_dir / "exits_untuned.csv")
    for rows, when in ((before, "before tuning"), (record.exits, "after")):
        if rows:
            console.print(exits_table(replace(record, exits=rows), f"Exits on held-out text, {when}"))
    if record.exits:
        console.print(EXITS_NOTE, style="dim")
        console.print()
    console.print(location_line(run_dir), soft_wrap=True)


def exits_table(record: RunRecord, title: str = "Exits on held-out text") -> Table:
    """One row per head: where it stands and how good it is on held-out text."""
    table = _table(title)
    for column in ("head", "layer", "loss", "perplexity", "accuracy", "agreement", "calib. error"):
        table.add_column(column, justify="left" if column == "head" else "right", no_wrap=True)
    styles = head_styles(record)
    for row in record.exits:
        head = str(row["head"])
        table.add_row(
            Text(head, styles.get(head, Style())),
            fixed(row.get("layer"), 0),
            fixed(row.get("loss")),
            perplexity(row.get("perplexity")),
            percent(row.get("accuracy"), 1),
            percent(row.get("agreement"), 1),
            fixed(row.get("calibration_error")),
        )
    return table


def speed_tables(record: RunRecord) -> list[Table]:
    """Speed against quality by threshold, with the share of tokens of each exit beside it, or below it for many exits."""
    heads = shared_heads(record.speed_quality)
    table = _table("Speed against quality")
    several = len({row.get("policy") for row in record.early_exit}) > 1
    for column, shown in (("decoding", record.names_modes), ("policy", several)):
        if shown:
            table.add_column(column, no_wrap=True)
    for column in ("threshold", "tokens/s", "speedup", "same", "layers"):
        table.add_column(column, justify="right", no_wrap=True)
    beside = heads if len(heads) <= MOST_SHARE_COLUMNS - 2 * several - 3 * record.names_modes else []
    for head in beside:
        table.add_column(short_name(head), justify="right", no_wrap=True, header_style=_header(record, head))
    for row in record.speed_quality:
        numbers = [
            "full" if row.get("decoding") == "full" else threshold(row.get("threshold")),
            fixed(row.get("tokens_per_second"), 1),
            fixed(row.get("speedup"), 2),
            percent(row.get("agreement")),
            fixed(row.get("mean_layers"), 1),
        ]
        full = row.get("decoding") == "full"
        mode = [MISSING if full else str(row.get("decoding"))] if record.names_modes else []
        policy = [MISSING if full else str(row.get("policy"))] if several else []
        table.add_row(*mode, *policy, *numbers, *(_share(row, head) for head in beside))
    return [table] if beside else [table, _shares_table(record, heads)]


def tasks_table(record: RunRecord) -> Table:
    """One row a setting of every task's metrics, as many as a reader can take in."""
    rows = [row for rows in record.task_scores.values() for row in rows]
    hidden = f"; the first {MOST_TASK_ROWS} of {len(rows)} rows of lm_eval.csv" if len(rows) > MOST_TASK_ROWS else ""
    table = _table(f"Tasks of lm-evaluation-harness{hidden}")
    for column in ("task", "metric", "decoding", "threshold", "score", "layers", "speedup"):
        table.add_column(column, justify="left" if column in ("task", "metric", "decoding") else "right", no_wrap=True)
    before = None
    for row in rows[:MOST_TASK_ROWS]:
        filter_ = "" if row.get("filter") == "none" else f", {row.get('filter')}"
        named = (str(row["task"]), f"{row['metric']}{filter_}")
        table.add_row(
            *(named if named != before else ("", "")),
            str(row["decoding"]),
            threshold(row.get("threshold")),
            with_error(row.get("score"), row.get("stderr")),
            fixed(row.get("mean_layers"), 1),
            fixed(row.get("speedup"), 2),
        )
        before = named
    return table


def _shares_table(record: RunRecord, heads: list[str]) -> Table:
    table = _table("Share of tokens per exit, %")
    table.add_column("threshold", no_wrap=True)
    rows = [row for row in record.speed_quality if row.get("decoding") == "full"] + record.leaving
    for row in rows:
        full = row.get("decoding") == "full"
        table.add_column("full" if full else threshold(row.get("threshold")), justify="right", no_wrap=True)
    styles = head_styles(record)
    for head in heads:
        table.add_row(Text(head, styles.get(head, Style())), *(_share(row, head) for row in rows))
    return table


def _share(row: dict[str, Cell], head: str) -> str:
    value = row.get(share_column(head))
    return fixed(100 * value, 0) if isinstance(value, (int, float)) else MISSING


def shared_heads(rows: TableRows) -> list[str]:
    """Heads that a table has share columns for, in the table's order."""
    return list(dict.fromkeys(column.removeprefix(SHARE) for row in rows for column in row if column.startswith(SHARE)))


def short_name(head: str) -> str:
    """`exit_06` as `6`: column heads and markers."""
    return "final" if head == FINAL else str(int(head.removeprefix("exit_")))


def chosen_sample(record: RunRecord) -> Generation | None:
    """The generation that shows most: the one whose tokens left at the most different places."""
    return max(record.generations, key=lambda sample: sample.variety, default=None)


def sample_text(record: RunRecord, sample: Generation) -> Text:
    """Prompt and continuation. Runs of tokens that left at one exit are coloured and underlined, and end in its layer
    as a superscript, so that the exits can be told apart without colour; the final head's tokens are plain."""
    styles = head_styles(record)
    text = Text(f"Sample, {sample.label} (bold: the prompt)\n\n", style="bold")
    text = Text.assemble(text, (visible(sample.prompt), "bold"))
    for head, tokens in groupby(sample.tokens, key=lambda token: token.head):
        joined = visible("".join(token.text for token in tokens))
        if head == FINAL:
            text.append(joined)
            continue
        body = joined.rstrip("\n")
        text.append(body, styles.get(head, Style()) + Style(underline=True))
        text.append(short_name(head).translate(SUPERSCRIPTS), styles.get(head, Style()) + Style(bold=True))
        text.append(joined[len(body) :])
    return text


def legend(record: RunRecord, sample: Generation) -> Text:
    """What the colours and superscripts of a sample mean, and how many tokens each exit emitted."""
    counts = sample.heads
    styles, total = head_styles(record), max(len(sample.tokens), 1)
    text = Text()
    for head in record.heads:
        mark = "plain" if head == FINAL else short_name(head).translate(SUPERSCRIPTS)
        if text:
            text.append("   ")
        text.append(f"{mark} {head}", styles.get(head, Style()))
        text.append(f" {percent(counts[head] / total)}")
    return text


def visible(text: str) -> str:
    """Text with control characters made visible, so that what a model writes cannot steer the terminal."""
    return "".join(char if char in "\n\t" or not unicodedata.category(char).startswith("C") else "�" for char in text)


def head_styles(record: RunRecord) -> dict[str, Style]:
    exits = [head for head in record.heads if head != FINAL]
    colours = exit_colours(len(exits), "terminal")
    return {head: Style(color=colour) for head, colour in zip(exits, colours, strict=True)}


def location_line(run_dir: Path) -> Text:
    """The line that says where everything is; never wrapped, so that the path can be copied."""
    report = " (open report.html)" if (run_dir / "report.html").exists() else ""
    return Text.assemble("Everything is in ", (str(run_dir), "bold"), report)


def _header(record: RunRecord, head: str) -> Style:
    return head_styles(record).get(head, Style()) + Style(bold=True)


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, caption_justify="left", padding=(0, 1)
    )
