"""megatron-core's forward-backward functions behind one call, and the steps that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

from eellm.mcore.parts import TransformerConfig


def forward_backward(
    forward_step: Callable, wrapped: list[Any], num_microbatches: int, shape: tuple[int, int], forward_only: bool
) -> None:
    """Run 1F1B, interleaved 1F1B or plain accumulation, by the layout. `shape` is (sequence length, micro batch size).

    Each chunk gets its own iterator over microbatch numbers. Enter `cpu_stand_ins` around it.
    """
    iterators = [iter(range(num_microbatches)) for _ in wrapped]
    single = len(wrapped) == 1
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=wrapped[0] if single else wrapped,
        num_microbatches=num_microbatches,
        seq_length=shape[0],
        micro_batch_size=shape[1],
        forward_only=forward_only,
    )


def free_data(output: torch.Tensor) -> None:
    """Let go of the values of a stage's output, which lives on for its graph only; what has been sent is another alias."""
    deallocate_output_tensor(output, deallocate_pipeline_outputs=True)


def back_propagate(output: torch.Tensor, grad: torch.Tensor) -> None:
    """`output.backward(grad)` for an output without values, of which autograd would say that the shapes differ."""
    custom_backward(output, grad)


def reduce_gradients(wrapped: list[Any], config: TransformerConfig, num_tokens: int, device: torch.device) -> None:
    """What the schedules do after the last microbatch: reduce gradients, divide them by the tokens of all data-parallel ranks,
    of which `num_tokens` are this rank's."""
    config.finalize_model_grads_func(wrapped, torch.tensor(num_tokens, dtype=torch.int, device=device))
