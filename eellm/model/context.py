"""What all layers of one forward pass share: rotary factors and the attention mask.

Shape legend: s tokens (queries), k keys, b sequences, d channels of a head. Hidden states are [s, b, h].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from eellm.config.schema import RotaryScalingConfig
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
    angles = positions.t().float().unsqueeze(-1) * rotary_frequencies(spec, positions.device)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_frequencies(spec: ModelSpec, device: torch.device | str = "cpu") -> torch.Tensor:
    """Radians per position of each pair of rotating channels, fp32."""
    rotating = int(spec.head_dim * spec.rotary_fraction) // 2 * 2
    exponent = torch.arange(0, rotating, 2, device=device, dtype=torch.float32) / rotating
    frequencies, scaling = 1.0 / spec.rotary_base**exponent, spec.rotary_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    return stretched if scaling.kind == "linear" else _llama3_frequencies(frequencies, stretched, scaling)


def _llama3_frequencies(frequencies: torch.Tensor, stretched: torch.Tensor, scaling: RotaryScalingConfig) -> torch.Tensor:
    """Llama 3.1's (transformers' `_compute_llama3_parameters`): between two numbers of turns over the original context, from
    the stretched frequencies to those there were."""
    low, high, positions = scaling.low_frequency_factor, scaling.high_frequency_factor, scaling.original_positions
    assert low is not None, "checked with the config"
    assert high is not None, "checked with the config"
    assert positions is not None, "checked with the config"
    turns = positions * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - share) * stretched + share * frequencies


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
