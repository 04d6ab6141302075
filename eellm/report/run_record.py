"""A run directory as data: what the report, the figures and the terminal tables read. Everything may be missing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eellm.drawing.number_text import threshold
from eellm.drawing.plot import Curve
from eellm.metrics.generations import read_generations
from eellm.metrics.names import FINAL, STEP, TRAIN_LOSS, VAL_LOSS, depth, heads_in
from eellm.metrics.rows import Row, read_rows
from eellm.metrics.tables import Cell, read_table

TableRows = list[dict[str, Cell]]
SHARE = "share_"


@dataclass(frozen=True)
class Token:
    """One generated token: its text, the head that emitted it, after how many layers and how confidently."""

    text: str
    head: str
    exit_layer: int | None
    confidence: float | None
    logprob: float | None


@dataclass(frozen=True)
class Generation:
    """One continuation. `threshold` is the exit policy's, one number or one per exit, None where it has none."""

    prompt: str
    text: str
    decoding: str
    threshold: float | list[float] | None
    tokens: tuple[Token, ...]
    seconds: float | None

    @property
    def is_full(self) -> bool:
        return self.decoding == "full"

    @property
    def label(self) -> str:
        if self.is_full:
            return "full depth"
        return self.decoding if self.threshold is None else f"threshold {threshold(self.threshold)}"

    @property
    def heads(self) -> Counter[str]:
        """How many tokens each head emitted."""
        return Counter(token.head for token in self.tokens)

    @property
    def variety(self) -> float:
        """0 when one head emitted all tokens, towards 1 the more evenly they are spread over heads."""
        return 1 - sum((count / len(self.tokens)) ** 2 for count in self.heads.values()) if self.tokens else 0.0


@dataclass(frozen=True)
class RunRecord:
    """All of a run directory that a report is made of."""

    run_dir: Path
    config: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    exits: TableRows = field(default_factory=list)
    trade_off: TableRows = field(default_factory=list)
    speed_quality: TableRows = field(default_factory=list)
    lm_eval: TableRows = field(default_factory=list)
    reliability: TableRows = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)

    @property
    def heads(self) -> list[str]:
        """Names of all heads that anything was recorded for, in order of depth."""
        names = {str(row["head"]) for row in (*self.exits, *self.reliability)}
        names |= {token.head for generation in self.generations for token in generation.tokens}
        for rows in (self.trade_off, self.speed_quality):
            names |= {column.removeprefix(SHARE) for row in rows for column in row if column.startswith(SHARE)}
        keys = {key for row in self.rows for key in row}
        names |= set(heads_in(TRAIN_LOSS, keys)) | set(heads_in(VAL_LOSS, keys))
        return sorted(names, key=depth)

    @property
    def num_layers(self) -> int | None:
        layers = setting(self.config, "model.num_layers")
        if layers is None:
            layers = next((row.get("layer") for row in self.exits if row["head"] == FINAL), None)
        return layers if isinstance(layers, int) else None

    @property
    def full_depth(self) -> dict[str, Cell] | None:
        """The full-depth row of speed_quality.csv."""
        return next((row for row in self.speed_quality if row.get("decoding") == "full"), None)

    @property
    def early_exit(self) -> TableRows:
        """The other rows of speed_quality.csv."""
        return [row for row in self.speed_quality if row.get("decoding") != "full"]

    @property
    def compared(self) -> list[str]:
        """Modes of decoding that speed_quality.csv sets against full depth, in the table's order."""
        return list(dict.fromkeys(str(row["decoding"]) for row in self.early_exit))

    @property
    def names_modes(self) -> bool:
        """Whether tables have to say how a row was decoded: `catch_up` alone is what early exit means unless said."""
        return self.compared not in ([], ["catch_up"])

    @property
    def leaving(self) -> TableRows:
        """Rows of one mode whose tokens leave early: where they leave is the policy's doing, not the mode's, and what
        exits only draft, the final head emits."""
        mode = next((mode for mode in self.compared if mode != "self_speculative"), None)
        return [row for row in self.early_exit if row["decoding"] == mode]

    @property
    def task_scores(self) -> dict[tuple[str, str, str], TableRows]:
        """Rows of lm_eval.csv by task, metric and filter; each begins with full depth."""
        found: dict[tuple[str, str, str], TableRows] = {}
        for row in self.lm_eval:
            found.setdefault((str(row["task"]), str(row["metric"]), str(row["filter"])), []).append(row)
        return found

    def layer_of(self, head: str) -> int | None:
        """Layers that a head's token has passed."""
        return self.num_layers if head == FINAL else int(head.removeprefix("exit_"))

    def curves(self, pattern: str) -> dict[str, Curve]:
        """One curve per head of a pattern of `eellm.metrics.names`, heads in order of depth."""
        heads = heads_in(pattern, {key for row in self.rows for key in row})
        return {head: self.curve(pattern.format(head=head)) for head in heads}

    def curve(self, key: str) -> Curve:
        points = [(row[STEP], row[key]) for row in self.rows if key in row]
        return Curve([step for step, _ in points], [value for _, value in points])


def setting(config: Mapping[str, Any], path: str) -> Any:
    """A value of a nested mapping by its dotted path; None where there is none."""
    node: Any = config
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def load_run(run_dir: Path) -> RunRecord:
    """Read a run directory; files that are not there leave their part empty."""
    return RunRecord(
        run_dir=run_dir,
        config=_read_yaml(run_dir / "config.yaml"),
        status=_read_json(run_dir / "status.json"),
        rows=read_rows(run_dir / "metrics.jsonl"),
        exits=read_table(run_dir / "exits.csv"),
        trade_off=read_table(run_dir / "trade_off.csv"),
        speed_quality=read_table(run_dir / "speed_quality.csv"),
        lm_eval=read_table(run_dir / "lm_eval.csv"),
        reliability=read_table(run_dir / "reliability.csv"),
        generations=[_generation(entry) for entry in read_generations(run_dir / "generations.jsonl")],
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _generation(entry: dict[str, Any]) -> Generation:
    return Generation(
        prompt=entry["prompt"],
        text=entry["text"],
        decoding=entry["decoding"],
        threshold=entry["threshold"],
        tokens=tuple(
            Token(token["text"], token["head"], token["exit_layer"], token["confidence"], token["logprob"])
            for token in entry["tokens"]
        ),
        seconds=entry["seconds"],
    )
