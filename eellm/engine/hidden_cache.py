"""Hidden states in front of exits, kept on disk: of a sweep over heads only the first run passes the backbone.

One file for each layer, [samples, s, h] in the order of the samples' numbers, memory-mapped and sparse until written; a rank
of a sequence-parallel group has its own. A folder belongs to one model, text, order and sequence length (`eellm.tasks.tune`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from eellm.data.batch import GlobalBatch
from eellm.engine.protocol import VisitorOf
from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.groups import Groups
from eellm.model.context import Context, training_context
from eellm.model.stage import HeadVisitor, Readout, Stage

_STORED = {"bf16": (torch.bfloat16, torch.int16), "fp32": (torch.float32, torch.int32)}
"""Type -> what it is, and as what numpy, which knows no bf16, has it."""


@dataclass(frozen=True)
class HiddenStates:
    """States [s, h] of samples 0 .. `samples` - 1 at exits of this rank. Ranks that read other data write other rows."""

    folder: Path
    dtype: str
    samples: int
    shape: tuple[int, int]
    groups: Groups

    def have(self, layers: Sequence[int], ids: torch.Tensor) -> bool:
        """Whether all samples [M, b] lie there for these layers, of each rank its own; all ranks agree on it."""
        mine = all(self._written(layer)[ids.numpy()].all() for layer in layers)
        agreed = torch.tensor(int(mine), device=self.groups.device)
        for group in (self.groups.tp, self.groups.pp, self.groups.dp):
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
        return bool(agreed)

    def read(self, layer: int, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[s, b, h] of samples [b]."""
        states = torch.from_numpy(self._states(layer)[ids.numpy()]).view(_STORED[self.dtype][0])
        return states.to(self.groups.device, dtype).transpose(0, 1).contiguous()

    def write(self, layer: int, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        """Keep [s, b, h] of samples [b]."""
        kept, stored = _STORED[self.dtype]
        self._states(layer)[ids.numpy()] = hidden.transpose(0, 1).to("cpu", kept).contiguous().view(stored).numpy()
        self._written(layer)[ids.numpy()] = 1

    def _states(self, layer: int) -> np.ndarray:
        dtype = np.int16 if self.dtype == "bf16" else np.int32
        return self._map(f"layer_{layer}", dtype, (self.samples, *self.shape))

    def _written(self, layer: int) -> np.ndarray:
        return self._map(f"layer_{layer}_written", np.uint8, (self.samples,))

    def _map(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        layout = self.groups.layout
        part = f"_{self.groups.tp_rank}of{layout.tp}" if layout.sequence_parallel else ""
        file = self.folder / f"{name}{part}.bin"
        self.folder.mkdir(parents=True, exist_ok=True)
        file.touch()
        return np.memmap(file, dtype, "r+", shape=shape)  # grows the file to the shape, as holes


class Keeping:
    """A head visitor that hands hidden states to another one, and keeps them."""

    def __init__(self, inner: HeadVisitor, states: HiddenStates, ids: torch.Tensor):
        self._inner, self._states, self._ids = inner, states, ids

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        self._states.write(readout.head.layer, self._ids, hidden)
        return self._inner.at_exit(hidden, readout, context)

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        return self._inner.at_final(hidden, readout, context)


def visit_kept(stages: Sequence[Stage], batch: GlobalBatch, visitor_of: VisitorOf, states: HiddenStates) -> None:
    """What a forward pass does at the exits of this rank, without one: their hidden states are read."""
    assert batch.sample_ids is not None
    with cpu_stand_ins(), torch.no_grad():
        for index in range(len(batch)):
            microbatch, ids = batch[index], batch.sample_ids[index].cpu()
            visitor = visitor_of(index, microbatch)
            for stage in stages:
                dtype = stage.config.params_dtype
                context = training_context(stage.spec, microbatch.positions, microbatch.documents, dtype)
                for segment in stage.segments:
                    if segment.exit is not None:
                        visitor.at_exit(states.read(segment.exit.head.layer, ids, dtype), segment.exit, context)
