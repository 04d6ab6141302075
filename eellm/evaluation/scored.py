"""The pass over held-out text that evaluation and calibration share: every head's scores, a microbatch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from eellm.data.batch import GlobalBatch
from eellm.engine.protocol import Engine
from eellm.evaluation.records import Records
from eellm.evaluation.visitor import EvaluationVisitor, counted_tokens
from eellm.mcore.groups import Groups
from eellm.model.spec import ModelSpec
from eellm.model.statistics import LabelScores


@dataclass(frozen=True)
class Scored:
    """The n counted tokens of a microbatch: `scores` [H, n] of all heads, the final one last, and `labels` [n].

    `sequence` [n] says to which of the microbatch's `num_sequences` a token belongs.
    """

    scores: LabelScores
    labels: torch.Tensor
    sequence: torch.Tensor
    num_sequences: int

    def sequence_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Values [k, n] of tokens, added up by sequence: fp64 [k, num_sequences]."""
        sums = torch.zeros(len(values), self.num_sequences, dtype=torch.float64, device=values.device)
        return sums.index_add_(1, self.sequence, values.double())


def scored(engine: Engine, batches: Iterable[GlobalBatch], spec: ModelSpec, groups: Groups, chunk: int) -> Iterator[Scored]:
    """The microbatches of this data-parallel rank's batches, equal on its pipeline and tensor-parallel ranks.

    Those all go through it together; logits of at most `chunk` tokens exist at a time.
    """
    for batch in batches:
        batch = batch.to(groups.device)
        records = Records()
        engine.visit(batch, partial(EvaluationVisitor, records=records, chunk=chunk))
        for index in range(len(batch)):
            microbatch = batch[index]
            places, labels = counted_tokens(microbatch)
            sequences = len(microbatch.tokens)
            yield Scored(records.gather(index, spec.heads, len(labels), groups), labels, places % sequences, sequences)
