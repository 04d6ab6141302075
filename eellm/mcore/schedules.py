"""megatron-core's forward-backward functions behind one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func


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
