"""megatron-core's optimizer behind the few calls that training needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from eellm.config.schema import OptimizerConfig, PrecisionConfig
from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.optimizer_state import load_states, main_parameters, sharded_states
from eellm.mcore.parts import DTYPES, TransformerConfig

LOWEST_LOSS_SCALE = 1.0


@dataclass(frozen=True)
class StepResult:
    """How an update ended, the same on all ranks.

    `overflow`: fp16's loss scale was too large and has been lowered; the weights are as before. `nonfinite`: a gradient
    or their norm is NaN or infinite, and no lower scale can help; the weights and the optimizer's states are as before.
    """

    outcome: Literal["applied", "overflow", "nonfinite"]
    grad_norm: float
    """The global norm before clipping; NaN after an overflow."""


class MegatronOptimizer:
    """AdamW or SGD on main gradients in fp32, with clipping, loss scaling and optionally sharded states.

    Gradients are clipped by their global norm, or with `clipped_apart` (the names of all exits that are trained, of a model
    of which nothing else is) those of each exit by its own: what one exit learns then does not depend on the others.
    """

    def __init__(
        self,
        optimizer: OptimizerConfig,
        precision: PrecisionConfig,
        wrapped: list[Any],
        config: TransformerConfig,
        clipped_apart: Sequence[str] = (),
    ):
        dtype = precision.dtype
        settings = McoreOptimizerConfig(
            optimizer=optimizer.name,
            lr=optimizer.lr,
            min_lr=0.0,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            sgd_momentum=optimizer.momentum,
            bf16=dtype == "bf16",
            fp16=dtype == "fp16",
            params_dtype=DTYPES[dtype],
            initial_loss_scale=precision.initial_loss_scale,
            min_loss_scale=LOWEST_LOSS_SCALE,
            loss_scale_window=precision.loss_scale_window,
            use_distributed_optimizer=optimizer.distributed,
            overlap_param_gather=optimizer.overlap_param_gather,
        )
        with cpu_stand_ins():
            self._optimizer = get_megatron_optimizer(settings, wrapped)
        for group in self.param_groups:  # mcore leaves this to its own scheduler
            group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
        self._clip = optimizer.clip_grad or math.inf
        self._apart = [_parameters_of(exit_, wrapped) for exit_ in clipped_apart]
        self._lowest_scale = LOWEST_LOSS_SCALE if dtype == "fp16" else math.inf
        config.grad_scale_func = self._optimizer.scale_loss

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    def loss_scale(self) -> float:
        """The factor on losses: fp16's dynamic scale, otherwise 1."""
        with cpu_stand_ins():
            return float(self._optimizer.get_loss_scale())

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> StepResult:
        """Unscale, clip, update; megatron-core's `step`, with a look at the norm before anything is changed."""
        scale = self.loss_scale()
        with cpu_stand_ins(), torch.no_grad():
            if self._optimizer.prepare_grads():
                # the scale stops falling at its minimum: what overflows there is no matter of scale
                return StepResult("overflow" if scale > self._lowest_scale else "nonfinite", math.nan)
            norm = float(self._optimizer.get_grad_norm())
            if not math.isfinite(norm):
                return StepResult("nonfinite", norm)
            for part in self._parts():
                if self._apart:
                    self._clip_apart(part)
                elif part.get_parameters():
                    clip_grad_by_total_norm_fp32(part.get_parameters(), self._clip, norm)
            self._optimizer.step_with_ready_grads()
        return StepResult("applied", norm)

    def sharded_state(self, model_state: dict[str, Any], is_loading: bool) -> dict[str, Any]:
        """megatron-core's global view of the optimizer states, in terms of the model's (`Stage.sharded_state_dict`)."""
        with cpu_stand_ins():
            return {str(n): sharded_states(part, model_state, is_loading) for n, part in enumerate(self._parts())}

    def load_state(self, model_state: dict[str, Any], saved: dict[str, Any]) -> None:
        """Take what `sharded_state` described and a checkpoint filled in; the model's weights are loaded before."""
        for number, part in enumerate(self._parts()):
            load_states(part, model_state, saved[str(number)])

    def reload_parameters(self) -> None:
        """Follow the model after its weights were loaded without the optimizer's states."""
        with cpu_stand_ins():
            self._optimizer.reload_model_params()

    def _clip_apart(self, part: Any) -> None:
        """All ranks take part in every exit's norm, those that hold nothing of it too."""
        mains = main_parameters(part)
        for parameters in self._apart:
            held = [mains[parameter] for parameter in parameters if parameter in mains]
            counted = [main.grad for main in held if param_is_not_tensor_parallel_duplicate(main)]
            norm = get_grad_norm_fp32(counted, grad_stats_parallel_group=part.get_grad_stats_parallel_group())
            if held:
                clip_grad_by_total_norm_fp32(held, self._clip, float(norm))

    def _parts(self) -> list[Any]:
        return getattr(self._optimizer, "chained_optimizers", [self._optimizer])


def _parameters_of(exit_: str, wrapped: list[Any]) -> list[torch.nn.Parameter]:
    """Of an exit, on this rank."""
    named = [item for chunk in wrapped for item in chunk.module.named_parameters()]
    return [parameter for name, parameter in named if name.startswith(f"heads.{exit_}.") and parameter.requires_grad]
