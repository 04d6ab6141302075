"""Decoder layers as decoding runs them: the parameters of `eellm.model.layer`, a fraction of the operations.

megatron-core's modules spend more time on a token than its products take where the model is small. Here a layer is its
products, what stands between them done in place, and nothing else: no hooks, no autograd functions, no copies of weights.
QKV stays as one product gives it; a group's queries and key stand beside each other and are turned in one go.
Shape legend: r rows (tokens of all sequences, one after the other), h channels, g key/value groups of this rank, p query heads
per group, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from eellm.mcore.parts import ACTIVATIONS, MLP, RowParallelLinear
from eellm.model.attention import Attention
from eellm.model.layer import DecoderLayer
from eellm.model.norm import Norm
from eellm.model.spec import ModelSpec


class KeysAndValues(Protocol):
    """Earlier tokens' keys and values, by layer name (`5`, or `exit_04` for the block of an exit)."""

    def attend(self, layer: str, mixed: torch.Tensor) -> torch.Tensor:
        """Store the keys and values of projections [r, g, p + 2, d], attend from their queries: [r, 1, g * p * d]."""
        ...


@dataclass(frozen=True)
class DecodingContext:
    """What all layers share that take the same rows. `cos`, `sin` [r, 1, 1, rotating channels] are those of `rotate_`;
    None without rotary positions."""

    kv: KeysAndValues
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn the first channels of [r, .., d] in place; the first half of `sin` is negated (`eellm.model.context.rotate`)."""
    rotating = cos.shape[-1]
    turned = x if x.shape[-1] == rotating else x[..., :rotating]
    swapped = turned.roll(rotating // 2, -1)
    turned.mul_(cos).addcmul_(swapped, sin)


class LeanNorm:
    """RMSNorm or LayerNorm of the last dimension."""

    def __init__(self, norm: Norm):
        self.weight, self.bias, self.size, self.eps = norm.weight, norm.bias, norm.size, norm.eps
        self._eps = torch.full((1,), norm.eps, device=norm.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.size, self.weight, self.bias, self.eps)
        if x.is_cuda:
            return F.rms_norm(x, self.size, self.weight, self.eps)
        # on the CPU torch composes rms_norm of more and slower operations
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps, length, length, value=1 / self.size[0]).rsqrt_()
        return torch.mul(x, scale).mul_(self.weight).type_as(x)


class RowParallel:
    """A product whose parts are summed over tensor-parallel ranks, then the bias."""

    def __init__(self, linear: RowParallelLinear, tp_group: dist.ProcessGroup):
        self.weight, self.bias = linear.weight, linear.bias
        self.tp_group = tp_group if tp_group.size() > 1 else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp_group is None:
            return F.linear(x, self.weight, self.bias)
        out = F.linear(x, self.weight)
        dist.all_reduce(out, group=self.tp_group)
        return out if self.bias is None else out.add_(self.bias)


class LeanMLP:
    def __init__(self, mlp: MLP, spec: ModelSpec, tp_group: dist.ProcessGroup):
        self.weight, self.bias = mlp.linear_fc1.weight, mlp.linear_fc1.bias
        self.activation, self.gated = ACTIVATIONS[spec.activation], spec.gated
        self.out = RowParallel(mlp.linear_fc2, tp_group)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[r, 1, h] -> [r, 1, h], a tensor of its own."""
        inner = F.linear(x, self.weight, self.bias)
        if not self.gated:
            return self.out(self.activation(inner))
        gate, up = inner.chunk(2, -1)
        return self.out(self.activation(gate).mul_(up))


class LeanAttention:
    def __init__(self, attention: Attention, spec: ModelSpec, name: str, tp_group: dist.ProcessGroup):
        self.name = name
        self.weight, self.bias = attention.linear_qkv.weight, attention.linear_qkv.bias
        self.groups = attention.num_query_groups_per_partition
        self.shape = (self.groups, spec.num_heads // spec.num_query_groups + 2, spec.head_dim)
        self.out = RowParallel(attention.linear_proj, tp_group)
        self.qk_norm = spec.qk_norm
        if spec.qk_norm == "head":
            self.query_norm, self.key_norm = LeanNorm(attention.q_layernorm), LeanNorm(attention.k_layernorm)
        elif spec.qk_norm == "projection":  # the modules: a norm over all heads, and over all ranks, has no shorter form
            self.query_norm, self.key_norm = attention.q_norm, attention.k_norm

    def __call__(self, x: torch.Tensor, context: DecodingContext) -> torch.Tensor:
        """[r, 1, h] -> [r, 1, h], a tensor of its own."""
        mixed = F.linear(x, self.weight, self.bias).view(-1, *self.shape)
        if self.qk_norm != "none":
            self._normalise_(mixed)
        if context.cos is not None and context.sin is not None:
            rotate_(mixed[:, :, :-1], context.cos, context.sin)
        return self.out(context.kv.attend(self.name, mixed))

    def _normalise_(self, mixed: torch.Tensor) -> None:
        """Queries and keys of [r, g, p + 2, d], in place."""
        query, key = mixed[:, :, :-2], mixed[:, :, -2:-1]
        for part, norm in ((query, self.query_norm), (key, self.key_norm)):
            if self.qk_norm == "head":
                part.copy_(norm(part))
            else:
                heads = part.reshape(part.shape[0], 1, -1, part.shape[-1])
                part.copy_(norm(heads).view_as(part))


class LeanLayer:
    """A `DecoderLayer` without gradients over keys and values of a cache; `name` is its key there."""

    def __init__(self, layer: DecoderLayer, spec: ModelSpec, tp_group: dist.ProcessGroup):
        self._layer = layer
        self.name, self.norm_after, self.parallel_residual = layer.name, layer.norm_after, layer.parallel_residual
        self.attention = LeanAttention(layer.attention, spec, layer.name, tp_group)
        self.mlp = LeanMLP(layer.mlp, spec, tp_group)
        self.attention_norm, self.mlp_norm = LeanNorm(layer.attention_norm), LeanNorm(layer.mlp_norm)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self._layer.parameters()

    def __call__(self, hidden: torch.Tensor, context: DecodingContext) -> torch.Tensor:
        """[r, 1, h] -> [r, 1, h]; what comes in is left as it is, for it may wait at an exit."""
        attended = self._attend(hidden, context).add_(hidden)
        if self.parallel_residual:
            return attended.add_(self._transform(hidden))
        return self._transform(attended).add_(attended)

    def _attend(self, hidden: torch.Tensor, context: DecodingContext) -> torch.Tensor:
        if self.norm_after:
            return self.attention_norm(self.attention(hidden, context))
        return self.attention(self.attention_norm(hidden), context)

    def _transform(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.norm_after:
            return self.mlp_norm(self.mlp(hidden))
        return self.mlp(self.mlp_norm(hidden))
