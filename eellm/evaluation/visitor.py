"""The head visitor of an evaluation: every head scores every counted token of a microbatch."""

from __future__ import annotations

import torch

from eellm.data.batch import Microbatch
from eellm.evaluation.records import Records
from eellm.model.context import Context
from eellm.model.stage import Readout
from eellm.model.statistics import LabelScores, label_scores


def counted_tokens(batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(places in the stage's token order [s, b] flattened, labels) of the n unmasked tokens, int64 [n] each."""
    places = (batch.loss_mask.t().reshape(-1) > 0).nonzero().squeeze(1)
    return places, batch.labels.t().reshape(-1)[places]


class EvaluationVisitor:
    """Puts the scores of microbatch `index` into `records`; logits of at most `chunk` tokens exist at a time."""

    def __init__(self, index: int, batch: Microbatch, records: Records, chunk: int):
        self.index, self.records, self.chunk = index, records, chunk
        self.places, self.labels = counted_tokens(batch)

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        self._score(hidden, readout, context)
        return hidden

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        return self._score(hidden, readout, context).loss.sum()

    def _score(self, hidden: torch.Tensor, readout: Readout, context: Context) -> LabelScores:
        features = readout.head.features(hidden, context).flatten(0, 1)
        scores = LabelScores(
            loss=torch.empty(len(self.places), device=features.device),
            prediction=torch.empty_like(self.places),
            confidence=torch.empty(len(self.places), device=features.device),
        )
        for begin in range(0, len(self.places), self.chunk):
            part = slice(begin, begin + self.chunk)
            chunk = label_scores(
                features[self.places[part]], readout.weight, self.labels[part], readout.vocabulary, readout.head.temperature
            )
            scores.loss[part], scores.prediction[part], scores.confidence[part] = chunk.loss, chunk.prediction, chunk.confidence
        self.records.put(self.index, readout.name, scores)
        return scores
