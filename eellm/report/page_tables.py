"""The tables of report.html."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from eellm.drawing.inline_svg import head_variable
from eellm.drawing.number_text import fixed, percent, perplexity, threshold, with_error
from eellm.metrics.names import share_column
from eellm.metrics.tables import Cell
from eellm.report.run_record import SHARE, RunRecord, TableRows


def colour(head: str) -> str:
    """Sets an element's colour variable to a head's."""
    return f"--c:var({head_variable(head)})"


def dotted(head: str) -> str:
    """A head's name behind a dot of its colour."""
    return f'<span class="dot" style="{colour(head)}"></span>{escape(head)}'


def table(columns: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """A table that scrolls sideways where it does not fit; `columns` are HTML, `rows` <tr> elements, `kind` a CSS class."""
    header = "".join(f"<th scope='col'>{column}</th>" for column in columns)
    attribute = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll card"><table{attribute}><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def exits_table(record: RunRecord) -> str:
    """One row per head."""
    columns = ["head", "after layer", "loss", "perplexity", "accuracy", "agreement with final", "calibration error"]
    rows = []
    for row in record.exits:
        cells = [
            dotted(str(row["head"])),
            fixed(row.get("layer"), 0),
            fixed(row.get("loss")),
            perplexity(row.get("perplexity")),
            percent(row.get("accuracy"), 1),
            percent(row.get("agreement"), 1),
            fixed(row.get("calibration_error")),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return table(columns, rows)


def speed_table(record: RunRecord) -> str:
    """One row per measured decoding, full depth first, with a column per head for the share of tokens that leave there."""
    heads = heads_with_shares(record.speed_quality)
    several = len({row.get("policy") for row in record.early_exit}) > 1
    with_accuracy = any(row.get("accuracy") is not None for row in record.speed_quality)
    columns = [
        *(["decoding"] if record.names_modes else []),
        "threshold",
        *(["policy"] if several else []),
        "tokens/s",
        "speedup",
        "same as full depth",
    ]
    columns += [*(["accuracy"] if with_accuracy else []), "mean layers", *map(dotted, heads)]
    rows = []
    for row in record.speed_quality:
        full = row.get("decoding") == "full"
        cells = [
            *([escape("full" if full else str(row.get("decoding")))] if record.names_modes else []),
            "full depth" if full else threshold(row.get("threshold")),
            *([escape(str(row.get("policy")))] if several else []),
            fixed(row.get("tokens_per_second"), 1),
            fixed(row.get("speedup"), 2),
            percent(row.get("agreement"), 1),
            *([percent(row.get("accuracy"), 1)] if with_accuracy else []),
            fixed(row.get("mean_layers"), 2),
        ]
        attribute = ' class="reference"' if full else ""
        rows.append(f"<tr{attribute}>" + "".join(f"<td>{cell}</td>" for cell in cells) + share_cells(row, heads) + "</tr>")
    return table(columns, rows)


def trade_off_table(record: RunRecord) -> str:
    """One row per threshold, teacher-forced: what each token's loss and accuracy are if it leaves by that threshold."""
    heads = heads_with_shares(record.trade_off)
    rows = []
    for row in record.trade_off:
        cells = [
            threshold(row.get("threshold")),
            percent(row.get("accuracy"), 1),
            fixed(row.get("loss")),
            percent(row.get("agreement"), 1),
            fixed(row.get("mean_layers"), 2),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + share_cells(row, heads) + "</tr>")
    return table(["threshold", "accuracy", "loss", "agreement with final", "mean layers", *map(dotted, heads)], rows)


def tasks_table(record: RunRecord) -> str:
    """One row a setting of every task's metrics."""
    columns = ["task", "metric", "decoding", "threshold", "score", "mean layers", "speedup", "documents", "shots", "cut"]
    rows = []
    for row in (row for rows in record.task_scores.values() for row in rows):
        cells = [
            escape(str(row["task"])),
            escape(str(row["metric"]) + ("" if row.get("filter") == "none" else f", {row.get('filter')}")),
            escape(str(row["decoding"])),
            threshold(row.get("threshold")),
            with_error(row.get("score"), row.get("stderr")),
            fixed(row.get("mean_layers"), 2),
            fixed(row.get("speedup"), 2),
            fixed(row.get("samples"), 0),
            fixed(row.get("num_fewshot"), 0),
            fixed(row.get("cut"), 0),
        ]
        attribute = ' class="reference"' if row["decoding"] == "full" else ""
        rows.append(f"<tr{attribute}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return table(columns, rows)


def share_cells(row: dict[str, Cell], heads: Sequence[str]) -> str:
    """Cells with a bar as wide as the share."""
    cells = []
    for head in heads:
        value = row.get(share_column(head))
        width = f"{100 * value:.1f}%" if isinstance(value, (int, float)) else "0%"
        cells.append(f'<td class="share" style="{colour(head)};--v:{width}">{percent(value)}</td>')
    return "".join(cells)


def heads_with_shares(rows: TableRows) -> list[str]:
    """Heads that a table has share columns for, in the table's order."""
    return list(dict.fromkeys(column.removeprefix(SHARE) for row in rows for column in row if column.startswith(SHARE)))
