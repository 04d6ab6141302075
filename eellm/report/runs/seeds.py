"""What seeds say of the runs of a page: means of each setting, and which differences between settings are more than chance."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import pandas as pd

from eellm.analysis import spread, within_noise
from eellm.drawing.number_text import MISSING, fixed, threshold
from eellm.metrics import names
from eellm.report.page_tables import table
from eellm.report.runs.compared import SEED, described, natural, value_text, varying
from eellm.report.runs.tables import breakable, folded, headlines, row_of

LOSSES = (names.VAL_LOSS, names.EVAL_LOSS)
SPEEDS = ("speedup", "agreement")
HARD_SPACE = "\N{NO-BREAK SPACE}"
WORDS = "Mean and sample standard deviation over the runs of each setting. Speed and agreement are those of one threshold."
PAIRED = (
    "Differences are from {baseline}, between runs of the same seed, with their 95 % interval (Student's t); within noise are "
    "those whose interval holds 0. Of twenty rows without any effect one is expected not to be."
)
ALONE = '<p class="note">No setting was run with several seeds, so the page cannot say which differences are noise.</p>'


def over_seeds(runs: pd.DataFrame, speeds: pd.DataFrame) -> str:
    """A row a measure and setting; "" where no setting has been run twice. `speeds`: of `eellm.analysis.speed_quality`."""
    differing = varying(runs)
    if SEED not in differing:
        return ALONE if len(runs) > 1 else ""
    settings = [name for name in differing if name != SEED]
    texts = [tuple(value_text(run[name]) for name in settings) for run in runs.to_dict("records")]
    labels = list(dict.fromkeys(texts))
    places = dict(
        zip(runs["run"], ((labels.index(text), seed) for text, seed in zip(texts, runs[SEED], strict=True)), strict=True)
    )
    rows, repeated = [], False
    for measure, values in _measures(runs, speeds):
        own = pd.DataFrame([(*places[run], value) for run, value in values.items()], columns=["setting", SEED, "value"])
        means = spread(own, "setting", "value").sort_values("setting").to_dict("records")
        repeated = repeated or any(row["n"] > 1 for row in means)
        differences = _differences(own) if len(labels) > 1 else {}
        for row in means:
            cells = [measure, *map(breakable, labels[row["setting"]]), _mean(row)]
            cells += differences.get(row["setting"], [MISSING] * 3) if len(labels) > 1 else []
            rows.append(row_of([*cells, str(row["n"])]))
    if not repeated:
        return ""
    columns = ["measure", *map(breakable, settings), "mean"]
    columns += [*(["difference", "within noise", "pairs"] if len(labels) > 1 else []), "seeds"]
    paired = PAIRED.format(baseline=described(runs.iloc[0].to_dict(), settings, runs)) if len(labels) > 1 else ""
    content = folded(f"{len(rows)} means", table(columns, rows, "sortable wraps"), len(rows))
    return f'<h3>Over seeds</h3><p class="note">{escape(f"{WORDS} {paired}".strip())}</p>{content}'


def _measures(runs: pd.DataFrame, speeds: pd.DataFrame) -> Iterator[tuple[str, dict[str, float]]]:
    """What is compared, as HTML, with its value of each run that has one."""
    for name in headlines(runs):
        if names.describe(name).pattern in LOSSES:
            known = runs.dropna(subset=[name])
            yield breakable(name), dict(zip(known["run"], known[name], strict=True))
    early = speeds[speeds["run"].isin(runs["run"])]
    if not {"decoding", "threshold", *SPEEDS} <= set(early.columns):
        return
    early = early[early["decoding"] != "full"]
    if early.empty:
        return
    # what every run has only one of is its setting, and compared as such
    by = [name for name in ("decoding", "policy") if name in early and early.groupby("run")[name].nunique().gt(1).any()]
    named = "" if by or early["decoding"].nunique() > 1 else f", {early['decoding'].iloc[0]}"
    by.append("threshold")
    groups: list[tuple[tuple[Any, ...], pd.DataFrame]] = [(tuple(key), own) for key, own in early.groupby(by, dropna=False)]
    for (*modes, limit), own in sorted(groups, key=lambda group: tuple(map(natural, group[0]))):
        for name in SPEEDS:
            known = own.dropna(subset=[name]).drop_duplicates("run", keep="last")
            if len(known):
                at = "" if limit is None or limit != limit else f" at {threshold(limit)}"
                mode = f", {' '.join(map(str, modes))}" if modes else named
                yield escape(f"{name}{mode}{at}"), dict(zip(known["run"], known[name], strict=True))


def _differences(own: pd.DataFrame) -> dict[int, list[str]]:
    """Cells of every setting but the first; nothing where that has no value, or a seed was run twice and so has no partner."""
    if 0 not in set(own["setting"]) or own.duplicated(["setting", SEED]).any():
        return {}
    return {int(row["setting"]): _cells(row) for row in within_noise(own, "setting", "value", 0).to_dict("records")}


def _cells(row: dict[Any, Any]) -> list[str]:
    if row["n"] == 0:
        return [MISSING, MISSING, "0"]
    interval = "" if row["n"] < 2 else f" ({row['low']:+.3f} to{HARD_SPACE}{row['high']:+.3f})"
    noise = MISSING if row["n"] < 2 else "yes" if row["within_noise"] else "no"
    return [f"{row['difference']:+.3f}{interval}", noise, str(row["n"])]


def _mean(row: dict[Any, Any]) -> str:
    deviation = "" if row["n"] < 2 else f" \N{PLUS-MINUS SIGN}{HARD_SPACE}{fixed(float(row['std']))}"
    return f"{fixed(float(row['mean']))}{deviation}"
