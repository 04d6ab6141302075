"""What runs have measured of their exits: quality of every head, calibration, and which head speaks at a threshold."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from eellm.analysis.runs import records, run_table, settings_of
from eellm.metrics.names import FINAL, VAL_LOSS, depth, heads_in, share_column

MEASURES = ("loss", "perplexity", "accuracy", "agreement", "calibration_error")
MOST_NATS = 700.0
"""Losses above are of runs that diverged: exp of them is no float."""
SHARE = share_column("")


def exit_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a run and head, in order of depth: `run`, `name`, the settings, `head`, `layer`, `loss` (nats per token),
    `perplexity`, `accuracy`, `agreement` with the final head, `calibration_error`, and `measured`.

    `measured` says on what: `evaluation` (exits.csv), or for a run without one `validation`: its last validation loss, which
    is of other batches, and no more than that.
    """
    evaluated = run_table(runs, "exits", ["head"], ["layer", *MEASURES]).assign(measured="evaluation")
    rest = runs[~runs["run"].isin(evaluated["run"])]
    validated = [row for run in records(rest) for row in _validated(runs, run)]
    place = {run: number for number, run in enumerate(runs["run"])}
    rows = sorted([*records(evaluated), *validated], key=lambda row: place[row["run"]])
    frame = pd.DataFrame(rows, columns=["run", "name", *settings_of(runs), "head", "layer", *MEASURES, "measured"])
    frame.attrs = evaluated.attrs
    return frame


def reliability(runs: pd.DataFrame) -> pd.DataFrame:
    """Calibration: one row a run, head and bin of confidence that has tokens: mean `confidence`, `accuracy`, `count`."""
    frame = run_table(runs, "reliability", ["head"], ["bin", "confidence", "accuracy", "count"])
    known = {"confidence", "accuracy"} <= set(frame.columns)
    return frame.dropna(subset=["confidence", "accuracy"]) if known else frame.head(0)


def exit_shares(table: pd.DataFrame) -> pd.DataFrame:
    """Which head speaks: rows of trade_off.csv or speed_quality.csv (`run_table`, `speed_quality`) made long, one row a head
    in order of depth, with `head` and `share` (of tokens) in place of the share columns."""
    columns = [column for column in map(str, table) if column.startswith(SHARE)]
    heads = sorted((column.removeprefix(SHARE) for column in columns), key=depth)
    rows = [
        {**label, "head": head, "share": shares[share_column(head)]}
        for label, shares in zip(records(table.drop(columns=columns)), records(table[columns]), strict=True)
        for head in heads
        if not math.isnan(shares[share_column(head)])
    ]
    return pd.DataFrame(rows, columns=[*table.columns.drop(columns), "head", "share"])


def _validated(runs: pd.DataFrame, run: dict[str, Any]) -> list[dict[str, Any]]:
    label = {name: run[name] for name in ("run", "name", *settings_of(runs))}
    num_layers = run.get("model.num_layers", runs.attrs.get("shared", {}).get("model.num_layers"))
    losses = {name: value for name, value in run.items() if isinstance(value, float) and not math.isnan(value)}
    rows = []
    for head in heads_in(VAL_LOSS, losses):
        loss = losses[VAL_LOSS.format(head=head)]
        layer = num_layers if head == FINAL else int(head.removeprefix("exit_"))
        rows.append(
            {
                **label,
                "head": head,
                "layer": layer,
                "loss": loss,
                "perplexity": math.exp(min(loss, MOST_NATS)),
                "measured": "validation",
            }
        )
    return rows
