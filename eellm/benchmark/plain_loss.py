"""The multi-exit loss as one would write it without deferral or chunks: the logits of all heads, then one backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from eellm.benchmark.exits_alone import exits_of, hidden_shape
from eellm.benchmark.variants import Variant
from eellm.model.context import Context, training_context
from eellm.model.objective import HeadWeights, LossSums, Objective
from eellm.model.stage import Readout


def plain_objective(
    readouts: list[Readout], hidden: list[torch.Tensor], labels: torch.Tensor, weights: HeadWeights, context: Context
) -> torch.Tensor:
    """`sum_i w_i L_i` of hidden states [s, b, h], one tensor a head, and labels [s * b]; all of them count."""
    losses = []
    for readout, states in zip(readouts, hidden, strict=True):
        features = readout.head.features(states, context).flatten(0, 1)
        logits = (features @ readout.weight[: readout.vocabulary.rows].t()).float()
        if readout.head.temperature != 1.0:
            logits = logits / readout.head.temperature
        loss = F.cross_entropy(logits, labels, reduction="sum")
        losses.append(weights.values[readout.name] * loss)
    return torch.stack(losses).sum()


class LossAlone:
    """The whole loss of one microbatch of a model that lies on one rank, forward and backward, ours and plain.

    Both read the same hidden states, one tensor a head, and the same weights, and add to the same gradients.
    """

    def __init__(self, variant: Variant):
        (stage,) = variant.chunks.stages
        shape, dtype, device = hidden_shape(variant), stage.config.params_dtype, variant.groups.device
        self.readouts = [*exits_of(stage), stage.readout("final")]
        self.hidden = [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for _ in self.readouts]
        self.context = training_context(stage.spec, variant.batch[0].positions, None, dtype)
        self.weights = HeadWeights(variant.weights.values)
        self.objective = Objective(variant.batch[0], self.weights, variant.options, LossSums(), variant.engine.grad_scale)
        self.nothing = torch.zeros((), dtype=dtype, device=device).expand(shape)

    def ours(self) -> torch.Tensor:
        self._clear()
        sums = self.objective.sums.sums
        sums.clear()
        pairs = list(zip(self.readouts, self.hidden, strict=True))
        passing = [self.objective.at_exit(hidden, readout, self.context) for readout, hidden in pairs[:-1]]
        final = self.objective.at_final(pairs[-1][1], pairs[-1][0], self.context)
        torch.autograd.backward([final, *passing], [None, *(self.nothing for _ in passing)])
        return torch.stack([self.weights.values[name] * loss for name, loss in sums.items()]).sum()

    def plain(self) -> torch.Tensor:
        self._clear()
        labels = self.objective.batch.labels.t().reshape(-1)
        objective = plain_objective(self.readouts, self.hidden, labels, self.weights, self.context)
        objective.backward()
        return objective.detach()

    def _clear(self) -> None:
        for hidden in self.hidden:
            hidden.grad = None
