"""What every held-out sequence loses at every threshold, from the evaluation's forward pass.

A sequence is the unit that is drawn independently; the tokens of one depend on each other. Its loss at a threshold is
the mean over its counted tokens of a token's loss, 0 or 1. Tokens leave as in the evaluation's trade-off: at the first
exit that is confident enough, the text before it being the reference's.

"Drawn" are the windows of the held-out text, which come in a shuffled order (`eellm.mcore.datasets`): what is certified
holds for text of the same kind, cut alike. Windows of one long document are less independent than those of many.

Shape legend: H heads with the final one last, E = H - 1 exits, T thresholds, b sequences of a microbatch, n counted
tokens of it, N sequences of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from eellm.data.batch import GlobalBatch
from eellm.engine.protocol import Engine
from eellm.errors import DataError
from eellm.evaluation.scored import Scored, scored
from eellm.evaluation.sums import first_confident
from eellm.mcore.groups import Groups
from eellm.model.spec import ModelSpec, per_exit


@dataclass(frozen=True)
class SequenceLosses:
    """Losses [N, T] in 0..1 of the sequences that have counted tokens; `chosen` [T, H] tokens by the head they leave at."""

    losses: np.ndarray
    chosen: np.ndarray


@dataclass(frozen=True)
class LossOptions:
    """`thresholds` fp32 [T, E], infinite where an exit is never asked; `chunk` tokens' logits exist at a time."""

    risk: str
    thresholds: torch.Tensor
    chunk: int = 1024


def threshold_grid(thresholds: Iterable[float | list[float]], active: list[int], exit_layers: list[int]) -> torch.Tensor:
    """fp32 [T, E]; each threshold is one number, or one per active exit."""
    rows = [dict(zip(active, per_exit(threshold, len(active)), strict=True)) for threshold in thresholds]
    return torch.tensor([[row.get(layer, torch.inf) for layer in exit_layers] for row in rows], dtype=torch.float32)


def sequence_losses(
    engine: Engine, batches: Iterable[GlobalBatch], spec: ModelSpec, groups: Groups, options: LossOptions
) -> SequenceLosses:
    """The losses of this data-parallel rank's batches together with all other ranks'; every rank gets the same.

    Raises DataError where no token of any batch counts.
    """
    thresholds = options.thresholds.to(groups.device)
    lost, counts = [], []
    chosen = torch.zeros(len(thresholds), len(spec.heads), dtype=torch.float64, device=groups.device)
    for part in scored(engine, batches, spec, groups, options.chunk):
        choice = first_confident(part.scores.confidence[:-1], thresholds)
        chosen += torch.nn.functional.one_hot(choice, len(spec.heads)).sum(1)
        tokens = part.sequence_sums(torch.ones_like(part.labels)[None])
        lost.append(part.sequence_sums(token_losses(options.risk, part, choice)))
        counts.append(tokens.squeeze(0))
    dist.all_reduce(chosen, group=groups.dp)
    lost_of_all, count_of_all = _over_ranks(torch.cat(lost, dim=1), groups), _over_ranks(torch.cat(counts), groups)
    counted = count_of_all > 0
    if not counted.any():
        raise DataError("the calibration saw no unmasked token. Give it held-out text: see data.split and calibration.batches.")
    losses = (lost_of_all[:, counted] / count_of_all[counted]).t()
    return SequenceLosses(losses.cpu().numpy(), chosen.cpu().numpy())


def token_losses(risk: str, part: Scored, choice: torch.Tensor) -> torch.Tensor:
    """0 or 1, [T, n], of tokens that leave at the heads `choice` [T, n].

    `disagreement`: another prediction than the final head's. `accuracy_loss`: the final head is right and this one is
    wrong; what an exit gets right and the final head wrong makes up for nothing, so that it bounds the accuracy lost.
    """
    predictions, full = part.scores.prediction, part.scores.prediction[-1]
    here = predictions[choice, torch.arange(choice.shape[1], device=choice.device)]
    differs = here != full
    return differs if risk == "disagreement" else differs & (full == part.labels)


def _over_ranks(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """[..., n] of each data-parallel rank -> [..., n dp]; every rank reads as many sequences."""
    gathered = [torch.empty_like(values) for _ in range(groups.dp.size())]
    dist.all_gather(gathered, values.contiguous(), group=groups.dp)
    return torch.cat(gathered, dim=-1)
