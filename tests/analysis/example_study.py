"""A small study with plausible numbers: three weights of the exits' losses, three seeds each, one run that failed and one that
was cut off while its record was written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from eellm.metrics.rows import read_rows, rewrite_rows
from eellm.metrics.tables import read_table, write_table
from tests.metrics.example_config import example_config
from tests.report.example_run import write_example_run

WEIGHTS, SEEDS = (0.1, 0.5, 1.0), (1, 2, 3)


def write_example_study(folder: Path) -> Path:
    """Nine runs that are done, `failed` and `broken`. Returns `folder`."""
    for weight in WEIGHTS:
        for seed in SEEDS:
            _write_run(folder / f"weight_{weight}_seed_{seed}", weight, seed)
    failed = _write_run(folder / "failed", 1.0, 4)
    _write_status(failed, "failed", "NonFiniteError: the loss of exit_02 is NaN at step 120 on stage 0")
    for name in ("metrics.json", "exits.csv", "trade_off.csv", "reliability.csv", "speed_quality.csv", "generations.jsonl"):
        (failed / name).unlink()
    broken = _write_run(folder / "broken", 1.0, 5)
    (broken / "metrics.json").write_text('{"val/loss/final": 4.')
    return folder


def _write_run(path: Path, weight: float, seed: int) -> Path:
    """Seeds shift all losses alike; the larger the weight, the better the exits, and the final head a little worse."""
    write_example_run(path)
    changes = {"seed": seed, "loss_weights.values": weight, "name": "exit_weights"}
    config = example_config({"exits.layers": [2, 4, 6], **changes}).model_dump()
    (path / "config.yaml").write_text(json.dumps({**config, "study": {"name": "exit_weights"}}))
    shift, chance = random.Random(seed).gauss(0, 0.03), random.Random(f"{weight} {seed}")

    def moved(head: str, loss: float) -> float:
        return loss + shift + chance.gauss(0, 0.006) + (0.03 * weight if head == "final" else -0.12 * weight)

    rows = [
        {key: moved(key.rpartition("/")[2], value) if "/loss/" in key else value for key, value in row.items()}
        for row in read_rows(path / "metrics.jsonl")
    ]
    rewrite_rows(path / "metrics.jsonl", rows)
    _change(path / "exits.csv", lambda row: {**row, "loss": moved(row["head"], row["loss"])})
    _change(path / "speed_quality.csv", lambda row: _faster(row, weight, chance))
    last = {key: value for row in rows for key, value in row.items() if key not in ("step", "time")}
    evaluated = {f"eval/loss/{row['head']}": row["loss"] for row in read_table(path / "exits.csv")}
    (path / "metrics.json").write_text(json.dumps({**last, **evaluated}))
    _write_status(path, "done")
    return path


def _change(file: Path, change: Callable[[dict], dict]) -> None:
    write_table(file, [change(row) for row in read_table(file)])


def _faster(row: dict, weight: float, chance: random.Random) -> dict:
    if row["decoding"] == "full":
        return row
    return {
        **row,
        "speedup": row["speedup"] + 0.1 * weight + chance.gauss(0, 0.01),
        "agreement": row["agreement"] - 0.02 * (1 - weight),
    }


def _write_status(run: Path, state: str, error: str | None = None) -> None:
    started = 1_790_000_000.0
    (run / "status.json").write_text(json.dumps({"state": state, "error": error, "started": started, "updated": started + 233.0}))
