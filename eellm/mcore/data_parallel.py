"""megatron-core's DistributedDataParallel around the chunks of a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.gradients import finaliser, mark_tied_copies
from eellm.mcore.groups import Groups
from eellm.mcore.parts import TransformerConfig


@dataclass(frozen=True)
class ReductionOptions:
    """Who holds optimizer states, and what overlaps with computation; see the config's `optimizer`."""

    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


def wrap(
    stages: list[Any], config: TransformerConfig, groups: Groups, options: ReductionOptions
) -> list[DistributedDataParallel]:
    """Wrap stages in chunk order and tell the schedules how to finish their gradients."""
    mark_tied_copies(stages)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=options.distributed_optimizer,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
    )
    with cpu_stand_ins():
        # chunks after the first are reduced whole: their communication overlaps with the first one's computation
        wrapped = [
            DistributedDataParallel(config, ddp_config, stage, disable_bucketing=index > 0) for index, stage in enumerate(stages)
        ]
    config.finalize_model_grads_func = finaliser(groups)
    if options.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
    return wrapped
