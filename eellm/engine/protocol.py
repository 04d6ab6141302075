"""The engine protocol: run the microbatches of a global batch through the pipeline. Usable with or without Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from eellm.data.batch import GlobalBatch, Microbatch
from eellm.mcore.groups import Groups
from eellm.model.objective import HeadWeights, LossSums
from eellm.model.stage import HeadVisitor

VisitorOf = Callable[[int, Microbatch], HeadVisitor]
"""Makes the head visitor of a microbatch from its index and data."""


@dataclass(frozen=True)
class Losses:
    """Mean loss per token by head, equal on all ranks, and the tokens they are means over."""

    means: dict[str, float]
    num_tokens: int

    def total(self, weights: HeadWeights) -> float:
        """The weighted sum that is minimised (with token weights: its plain counterpart)."""
        return sum(weight * self.means[name] for name, weight in weights.values.items())


class Engine(Protocol):
    """Forward and backward over the microbatches of one optimizer step."""

    def run(self, batch: GlobalBatch, weights: HeadWeights, forward_only: bool = False) -> Losses:
        """Multi-exit losses of a batch.

        Unless `forward_only`, gradients then lie in the chunks' buffers, reduced and divided by the token count.
        """
        ...

    def visit(self, batch: GlobalBatch, visitor_of: VisitorOf) -> None:
        """Forward only, with the caller's visitors at the heads."""
        ...


class TrainingEngine(Engine, Protocol):
    """An engine that an optimizer steps after."""

    grad_scale: Callable[[], float]
    """The factor that the optimizer applies to losses (fp16's loss scale); exits take the same."""


def reduce_losses(
    sums: LossSums, heads: list[str], num_tokens: int, groups: Groups, computed: Mapping[str, float] | None = None
) -> Losses:
    """Sum over pipeline stages (each head lives on one) and data-parallel ranks; tensor-parallel ranks already agree.

    `num_tokens` is this data-parallel rank's count of unmasked tokens, known on every stage; `computed` says by head for how
    many of them its loss was computed, None: for all.
    """
    local = [sums.sums[name].double() if name in sums.sums else torch.zeros((), dtype=torch.float64) for name in heads]
    packed = torch.stack([value.to(groups.device) for value in local])
    dist.all_reduce(packed, group=groups.pp)
    counts = [num_tokens if computed is None else computed[name] for name in heads]
    packed = torch.cat((packed, packed.new_tensor([*counts, num_tokens])))
    dist.all_reduce(packed, group=groups.dp)
    values = packed.tolist()
    means = {name: value / max(tokens, 1.0) for name, value, tokens in zip(heads, values, values[len(heads) :], strict=False)}
    return Losses(means, int(values[-1]))
