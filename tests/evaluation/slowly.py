"""The oracle: one row per token and head out of the plain model's logits, every number computed from that table by pandas."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from eellm.data.batch import GlobalBatch, Microbatch
from eellm.evaluation.exits import HeadQuality
from eellm.model.spec import ModelSpec
from tests.reference import Reference

# closer than this to a tie, an edge or a threshold, fp32 could fall on either side of it
SAFE = 1e-6


def token_table(spec: ModelSpec, parameters: dict[str, np.ndarray], batches: list[GlobalBatch]) -> pd.DataFrame:
    """Columns token, head, layer, loss, prediction, right, confidence, in fp64; unmasked tokens only."""
    reference = Reference(spec, {name: torch.from_numpy(value).double() for name, value in parameters.items()})
    rows = []
    for number, batch in enumerate(batches):
        for index in range(len(batch)):
            for head, tempered in reference.logits(batch[index]).items():
                rows += _head_rows(spec, head, tempered.numpy(), batch[index], (number, index))
    table = pd.DataFrame(rows)
    table["agrees"] = table.prediction == table.token.map(table[table["head"] == "final"].set_index("token").prediction)
    return table


def _head_rows(spec: ModelSpec, head: str, tempered: np.ndarray, batch: Microbatch, place: tuple[int, int]) -> list[dict]:
    exit_ = next((exit_ for exit_ in spec.exits if exit_.name == head), None)
    rows = []
    for sequence, position in zip(*np.nonzero(batch.loss_mask.numpy()), strict=True):
        probabilities = _softmax(tempered[sequence, position])
        plain = _softmax(tempered[sequence, position] * (exit_.temperature if exit_ else 1.0))
        label = int(batch.labels[sequence, position])
        best, second = np.sort(probabilities)[::-1][:2]
        assert best - second > SAFE, "two words are equally probable: fp32 could predict either"
        rows.append(
            {
                "token": (*place, int(sequence), int(position)),
                "head": head,
                "layer": exit_.layer if exit_ else spec.num_layers,
                "loss": -np.log(plain[label]),
                "prediction": int(probabilities.argmax()),
                "right": int(probabilities.argmax()) == label,
                "confidence": best,
            }
        )
    return rows


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def heads(table: pd.DataFrame, bins: int) -> list[HeadQuality]:
    qualities = []
    for head in table["head"].unique():
        tokens = table[table["head"] == head]
        qualities.append(
            HeadQuality(
                head=head,
                layer=tokens.layer.iloc[0],
                loss=tokens.loss.mean(),
                perplexity=np.exp(tokens.loss.mean()),
                accuracy=tokens.right.mean(),
                agreement=tokens.agrees.mean(),
                calibration_error=calibration_error(tokens, bins),
            )
        )
    return qualities


def calibration_error(tokens: pd.DataFrame, bins: int) -> float:
    """Guo et al., arXiv 1706.04599, equation 3."""
    groups = tokens.groupby(_bins(tokens, bins), observed=True)
    return sum(len(group) / len(tokens) * abs(group.right.mean() - group.confidence.mean()) for _, group in groups)


def _bins(tokens: pd.DataFrame, bins: int) -> pd.Series:
    edges = np.linspace(0, 1, bins + 1)
    distance = np.abs(tokens.confidence.to_numpy()[:, None] - edges[1:-1]).min(initial=1)
    assert distance > SAFE, "a confidence lies on a bin's edge: fp32 could put it on either side"
    return pd.cut(tokens.confidence, edges, labels=False)


def reliability_rows(table: pd.DataFrame, bins: int) -> list[dict]:
    rows = []
    for head in table["head"].unique():
        tokens = table[table["head"] == head]
        members = _bins(tokens, bins)
        for number in range(bins):
            inside = tokens[members == number]
            rows.append(
                {
                    "head": head,
                    "bin": number,
                    "count": len(inside),
                    "confidence": inside.confidence.mean() if len(inside) else None,
                    "accuracy": inside.right.mean() if len(inside) else None,
                }
            )
    return rows


def trade_off_row(table: pd.DataFrame, threshold: float) -> dict:
    """Token by token: walk through its heads from the shallowest until one is confident."""
    left = []
    for _, heads in table.groupby("token", sort=False):
        for number, head in enumerate(heads.itertuples()):
            assert abs(head.confidence - threshold) > SAFE, "a confidence lies on the threshold"
            if head.confidence >= threshold or number == len(heads) - 1:
                left.append(head)
                break
    chosen = pd.DataFrame(left)
    shares = {f"share_{head}": (chosen["head"] == head).mean() for head in table["head"].unique()}
    return {
        "threshold": threshold,
        "accuracy": chosen.right.mean(),
        "loss": chosen.loss.mean(),
        "agreement": chosen.agrees.mean(),
        "mean_layers": chosen.layer.mean(),
        **shares,
    }
