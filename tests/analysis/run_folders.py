"""Run directories with just what a test is about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from eellm.metrics.rows import Row, encode_row
from eellm.metrics.tables import TableRow, write_table

CONFIG = {
    "name": "example",
    "seed": 1,
    "task": {"name": "train"},
    "study": {"name": "weights"},
    "model": {"num_layers": 8, "rotary_scaling": None},
    "exits": {"layers": [2, 4], "head": "norm"},
    "loss_weights": {"values": 0.5},
}
STARTED = 1_790_000_000.0


def write_run(
    path: Path,
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    history: Sequence[Row] = (),
    tables: Mapping[str, Sequence[TableRow]] | None = None,
) -> Path:
    """A run of CONFIG with some (dotted) settings changed, done after a minute."""
    path.mkdir(parents=True)
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    for key, value in (settings or {}).items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    status = {"state": "done", "error": None, "started": STARTED, "updated": STARTED + 60, "fingerprint": "f"}
    (path / "status.json").write_text(json.dumps(status))
    (path / "metrics.json").write_text(json.dumps(metrics or {}))
    (path / "metrics.jsonl").write_text("".join(encode_row(row) + "\n" for row in history))
    for name, rows in (tables or {}).items():
        write_table(path / f"{name}.csv", rows)
    return path
