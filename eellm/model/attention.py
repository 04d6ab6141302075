"""Self-attention: megatron-core's projections around a choice of attention kernels.

Shape legend: s queries, k keys, b sequences, n query heads, g key/value groups, d channels of a head.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from eellm.errors import MissingExtra
from eellm.mcore.parts import (
    AttnMaskType,
    ColumnParallelLinear,
    MegatronModule,
    RowParallelLinear,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerConfig,
    make_sharded_tensors_for_checkpoint,
    set_tensor_model_parallel_attributes,
)
from eellm.model.context import AttentionMask, Context, Kernel, rotate
from eellm.model.norm import Norm
from eellm.model.spec import ModelSpec


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """torch's scaled_dot_product_attention; [s, b, n, d] with [k, b, g, d] -> [s, b, n * d]."""
    out = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask.allowed,
        is_causal=mask.allowed is None and query.shape[0] > 1,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.permute(2, 0, 1, 3).flatten(2)


def unfused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """The formula, with fp32 softmax; for checks and operation counts."""
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2).permute(1, 2, 0, 3) for x in (key, value))
    scores = query.permute(1, 2, 0, 3) @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    allowed = mask.allowed
    if allowed is None:
        queries, keys = scores.shape[-2:]
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    weights = scores.float().masked_fill(~allowed, -torch.inf).softmax(-1).type_as(value)
    return (weights @ value).permute(2, 0, 1, 3).flatten(2)


def flash_attn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """flash-attn's kernel, whichever generation imports; masks of documents are refused before a run starts."""
    if mask.allowed is not None:  # the kernel knows causal windows only
        return sdpa(query, key, value, mask)
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        try:
            from flash_attn.cute import flash_attn_func
        except ImportError as error:
            raise MissingExtra("flash-attn", "gpu", "model.attention=flash_attn") from error
    window = (-1, -1) if mask.window is None else (mask.window - 1, 0)
    out = flash_attn_func(*(x.transpose(0, 1) for x in (query, key, value)), causal=True, window_size=window)
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(0, 1).flatten(2)


def transformer_engine_kernel(spec: ModelSpec, tp_size: int) -> Kernel:
    """Transformer Engine's fused attention for plain causal masks and windows; other masks go to torch's."""
    try:
        from transformer_engine.pytorch import DotProductAttention
    except ImportError as error:
        raise MissingExtra("transformer-engine", "gpu", "model.attention=transformer_engine") from error
    attention = DotProductAttention(
        spec.num_heads,
        spec.head_dim,
        num_gqa_groups=spec.num_query_groups,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        tp_size=tp_size,
    )
    window = None if spec.sliding_window is None else (spec.sliding_window - 1, 0)

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        if mask.allowed is not None:
            return sdpa(query, key, value, mask)
        return attention(query, key, value, window_size=window)

    return kernel


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "unfused": unfused, "flash_attn": flash_attn}


class ProjectionRMSNorm(MegatronModule):
    """RMSNorm over all heads of a projection whose channels are split over tensor-parallel ranks (OLMo2's QK-norm)."""

    def __init__(self, config: TransformerConfig, local_size: int, eps: float, tp_group: dist.ProcessGroup):
        super().__init__(config)
        self.eps, self.tp_group = eps, tp_group
        self.weight = torch.nn.Parameter(torch.ones(local_size))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, heads, d] -> the same."""
        flat = x.flatten(2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.tp_group.size() > 1:
            squares = dist_functional.all_reduce(squares, group=self.tp_group)
        mean = squares / (flat.shape[-1] * self.tp_group.size())
        return (flat * torch.rsqrt(mean + self.eps)).type_as(x).mul(self.weight).view_as(x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class HeadNorm(Norm):
    """RMSNorm of one head's channels, as mcore builds its QK-norm. Each rank sees its own heads over the whole sequence;
    mcore sums the gradients over tensor-parallel ranks by the parameters' names."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float):
        super().__init__("rmsnorm", hidden_size, eps)


class _NoCoreAttention(torch.nn.Module):
    """Takes the place of mcore's attention kernel; ours is a function."""

    def __init__(self, **_: object):
        super().__init__()


class Attention(SelfAttention):
    """mcore's QKV and output projections; rotary positions, QK-norm and kernel are ours."""

    def __init__(self, spec: ModelSpec, config: TransformerConfig, layer_number: int):
        head_norm = HeadNorm if spec.qk_norm == "head" else None
        super().__init__(
            config,
            SelfAttentionSubmodules(ColumnParallelLinear, _NoCoreAttention, RowParallelLinear, head_norm, head_norm),
            layer_number,
            attn_mask_type=AttnMaskType.causal,
        )
        fused = spec.attention == "transformer_engine"
        self.kernel = transformer_engine_kernel(spec, self.world_size) if fused else KERNELS[spec.attention]
        self.recompute = False
        if spec.qk_norm == "projection":
            heads, groups = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
            self.q_norm = ProjectionRMSNorm(config, heads * spec.head_dim, spec.norm_eps, self.tp_group)
            self.k_norm = ProjectionRMSNorm(config, groups * spec.head_dim, spec.norm_eps, self.tp_group)
        self.qk_norm = spec.qk_norm

    def forward(self, hidden: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, h] -> ([s, b, h], bias to add or None)."""
        query, key, value = self.project(hidden)
        if context.cos is not None and context.sin is not None:
            query, key = rotate(query, context.cos, context.sin), rotate(key, context.cos, context.sin)
        if self.recompute and self.training:
            out = checkpoint(self.kernel, query, key, value, context.mask, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self.kernel(query, key, value, context.mask)
        return self.linear_proj(out)

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [s, b, n, d] and keys and values [s, b, g, d], normalised; mcore lays QKV out group by group."""
        mixed, _ = self.linear_qkv(hidden)
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        per_group = self.num_attention_heads_per_partition // groups
        mixed = mixed.view(*mixed.shape[:2], groups, (per_group + 2) * width)
        query, key, value = mixed.split((per_group * width, width, width), dim=-1)
        query = query.reshape(*query.shape[:2], -1, width)
        if self.qk_norm == "head":
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        elif self.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value
