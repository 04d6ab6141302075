"""Scores of single tokens: kept where a head lives, brought together over the pipeline one microbatch at a time."""

from __future__ import annotations

import torch
import torch.distributed as dist

from eellm.mcore.groups import Groups
from eellm.model.statistics import LabelScores


class Records:
    """Scores by microbatch and head, of the heads that this rank's chunks hold."""

    def __init__(self) -> None:
        self._scores: dict[tuple[int, str], LabelScores] = {}

    def put(self, index: int, head: str, scores: LabelScores) -> None:
        self._scores[index, head] = scores

    def gather(self, index: int, heads: list[str], count: int, groups: Groups) -> LabelScores:
        """Scores [heads, n] of a microbatch with n = `count` counted tokens, equal on all pipeline ranks, which all call this.

        The rank's own are dropped. Each head lives on one pipeline rank, so a sum of bit patterns over zeros moves
        losses, probabilities and ids unchanged in one exchange, and a microbatch bounds its size.
        """
        packed = torch.zeros((3, len(heads), count), dtype=torch.int32, device=groups.device)
        for row, head in enumerate(heads):
            scores = self._scores.pop((index, head), None)
            if scores is not None:
                packed[0, row] = scores.loss.view(torch.int32)
                packed[1, row] = scores.prediction.to(torch.int32)
                packed[2, row] = scores.confidence.view(torch.int32)
        if count:
            dist.all_reduce(packed, group=groups.pp)
        return LabelScores(loss=packed[0].view(torch.float32), prediction=packed[1], confidence=packed[2].view(torch.float32))
