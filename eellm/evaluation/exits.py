"""Held-out quality of every head and of exiting early at every threshold, from one forward pass.

The trade-off is teacher-forced: a token leaves at the first exit whose confidence reaches the threshold, and the text
before it is the reference's whatever earlier tokens did. Decoding can differ; this is its cheap forecast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

import torch

from eellm.config.schema import Config
from eellm.data.batch import GlobalBatch
from eellm.engine.protocol import Engine
from eellm.errors import DataError
from eellm.evaluation.scored import scored
from eellm.evaluation.sums import Sums
from eellm.mcore.groups import Groups
from eellm.metrics.names import evaluation, share_column
from eellm.metrics.tables import TableRow
from eellm.model.spec import ModelSpec


@dataclass(frozen=True)
class HeadQuality:
    """A row of exits.csv: nats per token, exp of them, and shares of tokens."""

    head: str
    layer: int
    loss: float
    perplexity: float
    accuracy: float
    agreement: float
    calibration_error: float


@dataclass(frozen=True)
class EvaluationOptions:
    """`chunk` tokens' logits exist at a time; see the config's `evaluation` and `trainer.loss_chunk`."""

    thresholds: tuple[float, ...] = ()
    calibration_bins: int = 15
    chunk: int = 1024

    @classmethod
    def of(cls, config: Config) -> EvaluationOptions:
        return cls(tuple(config.evaluation.thresholds), config.evaluation.calibration_bins, config.trainer.loss_chunk)


@dataclass(frozen=True)
class Evaluation:
    """Quality of every head over `tokens` unmasked tokens, and the rows of exits.csv, trade_off.csv and reliability.csv.

    Losses are at temperature 1; confidence is the top probability at the head's own temperature. A bin without tokens
    has neither confidence nor accuracy.
    """

    tokens: int
    heads: list[HeadQuality]
    trade_off: list[TableRow]
    reliability: list[TableRow]

    @property
    def exits(self) -> list[TableRow]:
        return [asdict(head) for head in self.heads]

    def scalars(self) -> dict[str, float]:
        """`eval/<column>/<head>` -> value."""
        columns = [field.name for field in fields(HeadQuality) if field.name not in ("head", "layer")]
        return {evaluation(column, head.head): getattr(head, column) for head in self.heads for column in columns}


def evaluate(
    engine: Engine, batches: Iterable[GlobalBatch], spec: ModelSpec, groups: Groups, options: EvaluationOptions
) -> Evaluation:
    """Evaluate this data-parallel rank's batches together with all other ranks'; every rank gets the same numbers.

    Raises DataError where no token of any batch counts.
    """
    thresholds = torch.tensor(options.thresholds, dtype=torch.float32, device=groups.device)
    sums = Sums.zeros(len(spec.heads), len(thresholds), options.calibration_bins, groups.device)
    for part in scored(engine, batches, spec, groups, options.chunk):
        sums.add(part.scores, part.labels, thresholds)
    sums.reduce(groups.dp)
    return tabulate(sums, spec, options.thresholds)


def tabulate(sums: Sums, spec: ModelSpec, thresholds: Sequence[float]) -> Evaluation:
    """Ratios of complete sums."""
    tokens = int(sums.tokens.item())
    if tokens == 0:
        raise DataError("the evaluation saw no unmasked token. Give it held-out text: see data.split and evaluation.batches.")
    layers = [*spec.exit_layers, spec.num_layers]
    return Evaluation(
        tokens=tokens,
        heads=_head_qualities(sums, spec.heads, layers),
        trade_off=_trade_off_rows(sums, spec.heads, layers, thresholds),
        reliability=_reliability_rows(sums, spec.heads),
    )


def _head_qualities(sums: Sums, heads: list[str], layers: list[int]) -> list[HeadQuality]:
    loss, accuracy, agreement = sums.heads / sums.tokens
    _, confidence, right = sums.bins
    # count / tokens * |right / count - confidence / count| of a bin, the counts cancelled
    calibration_error = (right - confidence).abs().sum(1) / sums.tokens
    columns = torch.stack((loss, loss.exp(), accuracy, agreement, calibration_error), dim=1).tolist()
    return [HeadQuality(head, layer, *values) for head, layer, values in zip(heads, layers, columns, strict=True)]


def _trade_off_rows(sums: Sums, heads: list[str], layers: list[int], thresholds: Sequence[float]) -> list[TableRow]:
    loss, accuracy, agreement = (sums.policies / sums.tokens).tolist()
    shares = sums.chosen / sums.tokens
    mean_layers = (shares @ shares.new_tensor(layers)).tolist()
    rows: list[TableRow] = []
    for number, threshold in enumerate(thresholds):
        row = {
            "threshold": threshold,
            "accuracy": accuracy[number],
            "loss": loss[number],
            "agreement": agreement[number],
            "mean_layers": mean_layers[number],
        }
        row |= dict(zip(map(share_column, heads), shares[number].tolist(), strict=True))
        rows.append(row)
    return rows


def _reliability_rows(sums: Sums, heads: list[str]) -> list[TableRow]:
    rows: list[TableRow] = []
    for head, counts, confidences, rights in zip(heads, *sums.bins.tolist(), strict=True):
        for number, (count, confidence, right) in enumerate(zip(counts, confidences, rights, strict=True)):
            rows.append(
                {
                    "head": head,
                    "bin": number,
                    "count": int(count),
                    "confidence": confidence / count if count else None,
                    "accuracy": right / count if count else None,
                }
            )
    return rows
