"""What all layers of one forward pass share: rotary factors and the attention mask.

Shape legend: s tokens (queries), k keys, b sequences, d channels of a head. Hidden states are [s, b, h].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eellm.model.spec import ModelSpec


@dataclass(frozen=True)
class AttentionMask:
    """Plain causal attention (`allowed` None), or a boolean [b, 1, s, k] of what each query may see."""

    allowed: torch.Tensor | None = None
    window: int | None = None


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMask], torch.Tensor]
"""Attention of queries [s, b, n, d] to keys and values [k, b, g, d] under a mask: [s, b, n * d]."""


@dataclass(frozen=True)
class Context:
    """`cos`, `sin` are [s, b or 1, 1, rotating channels], or None without rotary positions."""

    mask: AttentionMask
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None


def rotary_factors(spec: ModelSpec, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for positions [b, s] (RoFormer, arXiv 2104.09864; channels paired across halves as in Llama)."""
    rotating = int(spec.head_dim * spec.rotary_fraction) // 2 * 2
    exponent = torch.arange(0, rotating, 2, device=positions.device, dtype=torch.float32) / rotating
    angles = positions.t().float().unsqueeze(-1) / spec.rotary_base**exponent
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to the first channels of [s, b, heads, d]."""
    rotating = cos.shape[-1]
    turned, rest = x[..., :rotating], x[..., rotating:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def causal_mask(
    spec: ModelSpec, query_positions: torch.Tensor, key_positions: torch.Tensor, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Allowed [b, 1, s, k] from absolute positions [b, s] and [b, k]; `documents` [b, s] confines attention (then s = k)."""
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    allowed = distance >= 0
    if spec.sliding_window is not None:
        allowed &= distance < spec.sliding_window
    if documents is not None:
        allowed &= documents.unsqueeze(-1) == documents.unsqueeze(-2)
    return allowed.unsqueeze(1)


WINDOWED_KERNELS = ("flash_attn", "transformer_engine")
"""Attention kernels that know sliding windows without a mask."""


def training_context(spec: ModelSpec, positions: torch.Tensor, documents: torch.Tensor | None, dtype: torch.dtype) -> Context:
    """Context of whole sequences; `positions` [b, s] may restart at documents, order in the sequence decides causality."""
    allowed = None
    if documents is not None or (spec.sliding_window is not None and spec.attention not in WINDOWED_KERNELS):
        order = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        allowed = causal_mask(spec, order, order, documents)
    mask = AttentionMask(allowed, spec.sliding_window)
    if spec.position != "rotary":
        return Context(mask)
    # the same positions in every sequence: one row of factors serves all
    rows = positions if documents is not None else positions[:1]
    return Context(mask, *rotary_factors(spec, rows, dtype))
