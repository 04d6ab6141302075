"""A small run directory with plausible numbers, written as the tasks write it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from eellm.metrics.tables import write_table
from tests.metrics.example_config import example_config

THRESHOLDS = [0.2, 0.4, 0.6, 0.8, 0.9]
PROMPT = "def read_config(path):\n"
CONTINUATION = [
    '    """', "Read", " the", " config", "uration", " file", " and", " return", " a", " dict", ".", '"""\n', "    with",
    " open", "(", "path", ",", " encoding", "=", "'utf", "-8", "'", ")", " as", " f", ":\n", "        for", " line", " in",
    " f", ":\n", "            if", " not", " line", ".", "startswith", "(", "'<script>", "alert", "(1)", "</script>", "'", "):\n",
    "                self", ".", "_data", "[", "key", "]", " =", " value", "\n", "        return", " self", ".", "_data", "\n",
]  # fmt: skip


def heads_of(layers: list[int], num_layers: int) -> dict[str, int]:
    return {f"exit_{layer:02d}": layer for layer in layers} | {"final": num_layers}


def shares(heads: dict[str, int], threshold: float) -> dict[str, float]:
    """The surer an exit has to be, the fewer tokens leave there."""
    left, result = 1.0, {}
    for head, layer in heads.items():
        leave = 1.0 if head == "final" else (1 - threshold) * (0.35 + 0.4 * layer / max(heads.values()))
        result[head] = round(left * leave, 4)
        left -= result[head]
    return result


def write_example_run(run_dir: Path, layers: tuple[int, ...] = (2, 4, 6), num_layers: int = 8) -> Path:
    """A quickstart that has ended: metrics, tables, generations, config. Returns `run_dir`."""
    heads = heads_of(list(layers), num_layers)
    run_dir.mkdir(parents=True, exist_ok=True)
    config = example_config({"model.num_layers": num_layers, "exits.layers": list(layers), "loss_weights.values": 0.5})
    (run_dir / "config.yaml").write_text(json.dumps(config.model_dump()))
    write_metrics(run_dir, heads)
    write_evaluation(run_dir, heads)
    write_speed(run_dir, heads)
    write_generations(run_dir, heads)
    started = 1_790_000_000.0
    (run_dir / "status.json").write_text(json.dumps({"state": "running", "started": started, "updated": started + 233.0}))
    return run_dir


def loss_at(step: int, layer: int, num_layers: int) -> float:
    start, end = math.log(2048), 4.05 + 0.28 * (1 - layer / num_layers) ** 1.5
    return end + (start - end) * math.exp(-step / 70) * (1 - 0.08 * layer / num_layers)


def write_metrics(run_dir: Path, heads: dict[str, int]) -> None:
    noise, depth, rows = random.Random(3), max(heads.values()), []
    for step in range(10, 401, 10):
        shared = noise.gauss(0, 0.05)
        row = {"step": step, "time": 1_790_000_000.0 + step / 2}
        row |= {
            f"train/loss/{head}": loss_at(step, layer, depth) + shared + noise.gauss(0, 0.006) for head, layer in heads.items()
        }
        row |= {"train/grad_norm": 1 + abs(noise.gauss(0, 0.3)), "train/lr": 1e-3, "train/tokens_per_second": 14200.0}
        rows.append(row)
        if step % 50 == 0:
            validation = {f"val/loss/{head}": loss_at(step, layer, depth) + 0.04 for head, layer in heads.items()}
            rows.append({"step": step, "time": row["time"], **validation})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluation(run_dir: Path, heads: dict[str, int]) -> None:
    depth, exits, reliability = max(heads.values()), [], []
    for head, layer in heads.items():
        loss = loss_at(400, layer, depth) + 0.04
        exits.append(
            {
                "head": head,
                "layer": layer,
                "loss": loss,
                "perplexity": math.exp(loss),
                "accuracy": 0.31 - 0.05 * (1 - layer / depth),
                "agreement": 1.0 if head == "final" else 0.58 + 0.35 * layer / depth,
                "calibration_error": 0.012 + 0.02 * layer / depth,
            }
        )
        for bin_ in range(10):
            confidence = (bin_ + 0.5) / 10
            accuracy = min(confidence ** (1 + 0.25 * layer / depth) + 0.01, 1.0)
            measured = {"confidence": confidence, "accuracy": accuracy}
            row = {"head": head, "bin": bin_, "count": int(4000 * (1 - confidence) ** 2) + 20, **measured}
            reliability.append(row)
    write_table(run_dir / "exits.csv", exits)
    write_table(run_dir / "reliability.csv", reliability)


def mean_layers(heads: dict[str, int], share: dict[str, float]) -> float:
    return sum(layer * share[head] for head, layer in heads.items())


def write_speed(run_dir: Path, heads: dict[str, int]) -> None:
    depth = max(heads.values())
    full = {"decoding": "full", "policy": "never", "threshold": None, "tokens_per_second": 212.4, "speedup": 1.0}
    full |= {"agreement": 1.0, "accuracy": None, "mean_layers": float(depth)}
    full |= {f"share_{head}": float(head == "final") for head in heads}
    speed, trade_off = [full], []
    for threshold in THRESHOLDS:
        share = shares(heads, threshold)
        layers = mean_layers(heads, share)
        speedup = 1.36 - 0.5 * layers / depth
        shares_by_column = {f"share_{head}": value for head, value in share.items()}
        row = {"decoding": "catch_up", "policy": "max_probability", "threshold": threshold, "tokens_per_second": 212.4 * speedup}
        row |= {"speedup": speedup, "agreement": 0.72 + 0.28 * threshold**1.3, "accuracy": None, "mean_layers": layers}
        speed.append(row | shares_by_column)
        quality = {
            "accuracy": 0.26 + 0.05 * threshold,
            "loss": 4.37 - 0.25 * threshold,
            "agreement": 0.7 + 0.3 * threshold,
            "mean_layers": layers,
        }
        trade_off.append({"threshold": threshold, **quality, **shares_by_column})
    write_table(run_dir / "speed_quality.csv", speed)
    write_table(run_dir / "trade_off.csv", trade_off)


def write_generations(run_dir: Path, heads: dict[str, int]) -> None:
    chance, lines = random.Random(5), []
    for threshold in (None, 0.4, 0.8):
        share = {head: float(head == "final") for head in heads} if threshold is None else shares(heads, threshold)
        tokens = []
        for number, text in enumerate(CONTINUATION):
            head = chance.choices(list(heads), [share[name] for name in heads])[0]
            confidence = chance.uniform(threshold or 0.1, 1.0)
            measured = {"confidence": confidence, "logprob": math.log(confidence)}
            tokens.append({"text": text, "id": number, "exit_layer": heads[head], "head": head, **measured})
        entry = {"prompt": PROMPT, "text": "".join(CONTINUATION), "decoding": "full" if threshold is None else "catch_up"}
        lines.append(json.dumps({**entry, "threshold": threshold, "tokens": tokens, "seconds": 0.3}))
    (run_dir / "generations.jsonl").write_text("\n".join(lines) + "\n")
