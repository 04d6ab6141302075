"""The multi-exit training loss as a head visitor, and the autograd Functions that attach exit losses to hidden states.

Under any pipeline schedule the identity Functions below inject the gradient of `w_i * L_i` where the hidden states of
exit i pass, so the schedule's ordinary backward yields the gradient of the whole loss: EE-LLM's auxiliary loss
(arXiv 2312.04916, section 3.1) without touching a schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from eellm.config.schema import LossWeightsConfig
from eellm.data.batch import Microbatch
from eellm.model.context import Context
from eellm.model.loss_weights import exit_weights
from eellm.model.spec import ModelSpec
from eellm.model.stage import Readout
from eellm.model.vocabulary import LossOptions, linear_cross_entropy

ExitLoss = Callable[[torch.Tensor], torch.Tensor]


class DeferredExit(torch.autograd.Function):
    """Identity on hidden states whose backward runs the exit, forward and backward.

    Only the hidden states are kept until then, so logits of one microbatch exist at a time on every schedule. The
    head's parameters are inputs and receive their gradients through the outer graph: a parameter used at several
    places (a tied matrix) is accumulated once per backward pass, which megatron-core's overlapped gradient reduction
    relies on.
    """

    @staticmethod
    def forward(ctx, hidden, exit_loss, scale, *parameters):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden)
        ctx.exit_loss, ctx.scale, ctx.parameters = exit_loss, scale, parameters
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            loss = ctx.exit_loss(hidden)
        inputs = (hidden, *ctx.parameters)
        exit_grad, *parameter_grads = torch.autograd.grad(loss, inputs, torch.full_like(loss, ctx.scale()))
        return grad + exit_grad, None, None, *parameter_grads


class EagerExit(torch.autograd.Function):
    """Identity on hidden states; `loss`, computed in the forward pass, receives the gradient `scale()`."""

    @staticmethod
    def forward(ctx, hidden, loss, scale):  # type: ignore[no-untyped-def]
        ctx.scale = scale
        ctx.save_for_backward(loss)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, torch.full_like(ctx.saved_tensors[0], ctx.scale()), None


@dataclass(frozen=True)
class HeadWeights:
    """Loss weights of one step: head name -> weight; `token_confidence` weighs an exit's tokens by its confidence."""

    values: dict[str, float]
    token_confidence: bool = False


def head_weights(config: LossWeightsConfig, spec: ModelSpec, step: int) -> HeadWeights:
    """Loss weights of the optimizer step `step` (0-based), the final head's included."""
    exits = exit_weights(config, step, len(spec.exits)) if spec.exits else []
    values = dict(zip(spec.heads, [*exits, config.final], strict=spec.has_final_head))
    return HeadWeights(values, config.kind == "token_confidence")


@dataclass(frozen=True)
class ObjectiveOptions:
    """What is the same for all microbatches of a run."""

    deferred: bool = True
    chunk: int = 1024


@dataclass
class LossSums:
    """Plain losses summed over tokens, by head, gathered while microbatches run on this rank."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, loss: torch.Tensor) -> None:
        self.sums[name] = self.sums[name] + loss if name in self.sums else loss


class Objective:
    """Losses of one microbatch. Labels and mask are bound here: by backward time the stage has seen other microbatches."""

    def __init__(
        self, batch: Microbatch, weights: HeadWeights, options: ObjectiveOptions, sums: LossSums, scale: Callable[[], float]
    ):
        self.batch = batch
        self.weights, self.options, self.sums, self.scale = weights, options, sums, scale

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        def loss(states: torch.Tensor) -> torch.Tensor:
            return self._loss(states, readout, context)

        if not torch.is_grad_enabled():
            loss(hidden)
            return hidden
        if self.options.deferred:
            return DeferredExit.apply(hidden, loss, self.scale, *readout.parameters())
        return EagerExit.apply(hidden, loss(hidden), self.scale)

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        return self._loss(hidden, readout, context)

    def _loss(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        return self._text_loss(readout.head.features(hidden, context), readout)

    def _text_loss(self, features: torch.Tensor, readout: Readout) -> torch.Tensor:
        """The weighted loss of the microbatch's labels; `features` as heads make them."""
        is_exit = readout.name != "final"
        options = LossOptions(
            temperature=readout.head.temperature,
            chunk=self.options.chunk,
            confidence_weighted=self.weights.token_confidence and is_exit,
            grad_scale=self.scale(),
        )
        # flattened where they are used: copies would live as long as the microbatch is in flight
        labels, mask = (part.t().reshape(-1) for part in (self.batch.labels, self.batch.loss_mask))
        objective, loss = linear_cross_entropy(features.flatten(0, 1), readout.weight, labels, mask, readout.vocabulary, options)
        self.sums.add(readout.name, loss)
        return objective * self.weights.values[readout.name]
