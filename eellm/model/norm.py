"""RMSNorm and LayerNorm. megatron-core's wrapper refuses sequence parallelism without Apex or Transformer Engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from eellm.model.spec import ModelSpec


class Norm(nn.Module):
    """Normalises the last dimension. With `sequence_parallel` its gradients are summed over tensor-parallel ranks by mcore."""

    def __init__(self, kind: str, size: int, eps: float, sequence_parallel: bool = False):
        super().__init__()
        self.size, self.eps = (size,), eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layernorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.size, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.size, self.weight, self.eps)


def model_norm(spec: ModelSpec, sequence_parallel: bool) -> Norm:
    return Norm(spec.norm, spec.hidden_size, spec.norm_eps, sequence_parallel)
