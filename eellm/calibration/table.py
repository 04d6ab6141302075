"""A calibration in the terminal, at most 100 columns wide: the tests in order, and the verdict in words."""

from __future__ import annotations

from rich import box
from rich.table import Table

from eellm.calibration.bounds import enough_sequences
from eellm.calibration.result import Calibration, Threshold
from eellm.drawing.number_text import TIMES, fixed, percent, plural, threshold
from eellm.metrics.names import share_column
from eellm.metrics.tables import TableRow

NOTE = "layers: mean per token on this text; in layers: the model's over these, without the exits' own heads"
RISKS = {
    "disagreement": "of a sequence's tokens differ from the full model's",
    "accuracy_loss": "of a sequence's tokens are right in the full model and wrong with exits",
}


def calibration_rows(calibration: Calibration) -> list[TableRow]:
    """Rows of calibration.csv."""
    rows: list[TableRow] = []
    for test in calibration.tests:
        row = {
            "threshold": shown(test.threshold),
            "risk": test.risk,
            "p_value": test.p_value,
            "certified": test.certified,
            "mean_layers": test.mean_layers,
            "speedup": test.speedup,
        }
        rows.append(row | {share_column(head): share for head, share in test.shares.items()})
    return rows


def calibration_table(calibration: Calibration) -> Table:
    title = f"Calibrated exits: {calibration.risk} on {plural(calibration.sequences, 'held-out sequence')}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("threshold", overflow="fold")
    for column in ("risk", "p-value", "certified", "layers", "in layers"):
        table.add_column(column, justify="right", no_wrap=True)
    for test in calibration.tests:
        table.add_row(
            str(shown(test.threshold)),
            percent(test.risk, 2),
            f"{test.p_value:.2g}",
            "yes" if test.certified else "no",
            fixed(test.mean_layers, 2),
            f"{fixed(test.speedup, 2)}{TIMES}",
            style="bold" if test == calibration.chosen else None,
        )
    return table


def verdict(calibration: Calibration) -> str:
    """What was certified, and what stood in the way of more."""
    sure = f"With probability {percent(1 - calibration.delta)}"
    bound = f"on average at most {percent(calibration.epsilon, 1)} {RISKS[calibration.risk]}"
    chosen, failed = calibration.chosen, next((test for test in calibration.tests if not test.certified), None)
    if chosen.threshold is None:
        text = f"No threshold can be certified, so no token may exit: never. Wanted: {sure.lower()}, {bound}."
    else:
        text = (
            f"{sure}, {bound}, when tokens exit at threshold {shown(chosen.threshold)}: greedily, on text like this. "
            f"They then pass {fixed(chosen.mean_layers, 2)} of {fixed(calibration.tests[0].mean_layers, 0)} layers."
        )
    if failed is None:
        return f"{text} All thresholds asked for are certified: lower ones may be too (calibration.thresholds)."
    enough = enough_sequences(failed.risk, calibration.epsilon, calibration.delta)
    if enough is None:
        return f"{text} At {shown(failed.threshold)} the risk measured, {percent(failed.risk, 2)}, is itself above the bound."
    return (
        f"{text} At {shown(failed.threshold)} the risk measured is {percent(failed.risk, 2)}; where that stays, "
        f"{plural(enough, 'sequence')} would certify it, and {calibration.sequences:,} were read (calibration.batches)."
    )


def shown(value: Threshold) -> float | str:
    """One cell: a number, one number per active exit, or `never`."""
    if value is None:
        return "never"
    return threshold(value) if isinstance(value, list) else value
