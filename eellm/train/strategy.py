"""The smallest Lightning strategy around megatron-core: groups and wrapping exist already, checkpoints are distributed.

One Lightning batch is the global batch of a data-parallel rank, so Lightning's steps are optimizer steps. Ranks are
started outside; Lightning neither launches, wraps nor synchronises anything here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy

from eellm.mcore import checkpoint as mcore_checkpoint
from eellm.mcore.checkpoint_writer import CheckpointWriter
from eellm.mcore.groups import Groups
from eellm.train.module import EarlyExitModule


class RunningRanks(LightningEnvironment):
    """The ranks of the process group that is already there."""

    def __init__(self, groups: Groups):
        super().__init__()
        self._groups = groups

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return self._groups.layout.world_size

    def set_world_size(self, size: int) -> None:
        assert size == self.world_size()

    def global_rank(self) -> int:
        return self._groups.rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self._groups.rank

    def local_rank(self) -> int:
        return self._groups.device.index or 0

    def teardown(self) -> None:
        pass  # the process group outlives the trainer


class DistributedCheckpoints(CheckpointIO):
    """Lightning's checkpoint files as megatron-core's folders."""

    def __init__(self, writer: CheckpointWriter):
        self._writer = writer

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        self._writer.save(Path(path), checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        raise NotImplementedError("loading needs a template of this rank's shards: MegatronStrategy.load_checkpoint")

    def remove_checkpoint(self, path: str | Path) -> None:
        raise NotImplementedError("what is kept is decided where it is known to be whole: eellm.train.checkpoints")


class MegatronStrategy(ParallelStrategy):
    """Trains an `eellm.train.module.EarlyExitModule` on existing groups."""

    def __init__(self, groups: Groups, writer: CheckpointWriter):
        environment: ClusterEnvironment = RunningRanks(groups)
        super().__init__(
            parallel_devices=[groups.device] * groups.layout.world_size,
            cluster_environment=environment,
            checkpoint_io=DistributedCheckpoints(writer),
        )
        self.groups = groups

    def _configure_launcher(self) -> None:
        self._launcher = None

    @property
    def root_device(self) -> torch.device:
        return self.groups.device

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self.groups.layout.dp, "rank": self.groups.dp_rank}

    def setup(self, trainer: Trainer) -> None:
        self.accelerator.setup(trainer)
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)

    def model_to_device(self) -> None:
        pass

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        return batch.to(self.root_device)

    def barrier(self, name: str | None = None) -> None:
        dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Sum or mean over all ranks. Losses arrive here equal already; Lightning's own decisions are what is reduced."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        total = tensor.detach().clone().to(self.root_device)
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group) if reduce_op in ("mean", "avg") else total

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # the optimizer must exist before its shards can be asked for

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # weights travel as sharded tensors

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None) -> None:
        checkpoint.pop("state_dict", None)
        checkpoint["optimizer_states"] = []  # Lightning refuses to resume without the key
        self.checkpoint_io.save_checkpoint({**checkpoint, **self._sharded(is_loading=False)}, filepath)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return mcore_checkpoint.load(Path(checkpoint_path), self._sharded(is_loading=True))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        mcore_checkpoint.load_trained_state(self._module.chunks.stages, checkpoint)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        model = mcore_checkpoint.trained_state(self._module.chunks.stages)
        self._module.megatron_optimizer.load_state(model, checkpoint["optimizer"])

    def _sharded(self, is_loading: bool) -> dict[str, Any]:
        self._module.chunks.synchronise_parameters()
        model = mcore_checkpoint.trained_state(self._module.chunks.stages)
        return {**model, "optimizer": self._module.megatron_optimizer.sharded_state(model, is_loading)}

    @property
    def _module(self) -> EarlyExitModule:
        assert isinstance(self.lightning_module, EarlyExitModule)
        return self.lightning_module
