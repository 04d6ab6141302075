"""What an evaluation adds up over tokens. Sums are exact on every layout; ratios are taken at the end (`exits`).

Shape legend: H heads with the final one last, E = H - 1 exits, T thresholds, B calibration bins, n counted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from eellm.model.statistics import LabelScores


@dataclass(frozen=True)
class Sums:
    """fp64, so that counts are exact.

    `heads` [3, H]: loss, right predictions, predictions equal to the final head's. `bins` [3, H, B]: tokens, confidence,
    right predictions. `policies` [3, T]: as `heads`, of the head each token exits at. `chosen` [T, H]: tokens per head.
    """

    tokens: torch.Tensor
    heads: torch.Tensor
    bins: torch.Tensor
    policies: torch.Tensor
    chosen: torch.Tensor

    @classmethod
    def zeros(cls, heads: int, thresholds: int, bins: int, device: torch.device) -> Sums:
        shapes = ((1,), (3, heads), (3, heads, bins), (3, thresholds), (thresholds, heads))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, scores: LabelScores, labels: torch.Tensor, thresholds: torch.Tensor) -> None:
        """Add n tokens from scores [H, n], labels [n] and thresholds [T]."""
        right = (scores.prediction == labels).double()
        agrees = (scores.prediction == scores.prediction[-1]).double()
        values = torch.stack((scores.loss.double(), right, agrees))
        choice = first_confident(scores.confidence[:-1], thresholds)
        self.tokens.add_(labels.numel())
        self.heads.add_(values.sum(2))
        self.bins.add_(_bin_sums(scores.confidence, right, self.bins.shape[2]))
        self.policies.add_(values[:, choice, torch.arange(labels.numel(), device=choice.device)].sum(2))
        self.chosen.add_(torch.nn.functional.one_hot(choice, values.shape[1]).sum(1))

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Sum over data-parallel ranks, in place."""
        parts = [getattr(self, field.name) for field in fields(self)]
        packed = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(packed, group=group)
        for part, total in zip(parts, packed.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))


def first_confident(confidence: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Index [T, n] of the first exit whose confidence [E, n] reaches the threshold; E, the final head, where none does.

    Thresholds are [T], the same for all exits, or [T, E].
    """
    per_exit = thresholds if thresholds.dim() == 2 else thresholds[:, None]
    hesitant = ~(confidence >= per_exit[..., None])
    return hesitant.long().cumprod(dim=1).sum(dim=1)


def bin_of(confidence: torch.Tensor, bins: int) -> torch.Tensor:
    """Index i of the equal-width bin (i / bins, (i + 1) / bins] of each confidence (Guo et al., arXiv 1706.04599, section 2)."""
    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    return torch.bucketize(confidence.double(), edges)


def _bin_sums(confidence: torch.Tensor, right: torch.Tensor, bins: int) -> torch.Tensor:
    """[3, H, B] of [H, n]. Sums over a one-hot axis, not scattered additions: those differ between runs on a GPU."""
    member = torch.nn.functional.one_hot(bin_of(confidence, bins), bins).double()
    values = torch.stack((torch.ones_like(right), confidence.double(), right))
    return torch.einsum("hnb,qhn->qhb", member, values)
