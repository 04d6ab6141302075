"""Attention of few queries to many keys, where the queries of a key/value group attend as rows of one product.

No key or value is repeated for the queries that share it, and results leave in the order that the output projection reads.
It is torch's kernel throughout: `model.attention` chooses one for whole sequences.
Shape legend: b sequences, s queries of one sequence, k keys, g key/value groups, p query heads per group, d channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as what is added to scores, made once for all layers: torch would do it in each."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def newest_rows(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """One query of each sequence [b, g, p, d] to keys and values [b, g, k, d]: [b, 1, g * p * d].

    `mask` [b * g, 1, 1, k] is added to the scores; None where each query sees all keys.
    """
    sequences, groups, per_group, width = query.shape
    out = F.scaled_dot_product_attention(
        query.reshape(sequences * groups, 1, per_group, width),
        keys.flatten(0, 1).unsqueeze(1),
        values.flatten(0, 1).unsqueeze(1),
        attn_mask=mask,
    )
    return out.reshape(sequences, 1, -1)


def padded_rows(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """A few queries of each of several sequences [r, g, p, d] to keys and values [b, g, k, d]: [r, 1, g * p * d].

    `mask` [b * g, 1, s * p, k], s the most queries of a sequence; row r stands at `places` [r] of b * s.
    """
    sequences, groups, _, width = keys.shape
    per_group, most = query.shape[2], mask.shape[2] // query.shape[2]
    padded = query.new_zeros(sequences * most, *query.shape[1:])
    padded[places] = query
    rows = padded.view(sequences, most, groups, per_group, width).transpose(1, 2).reshape(-1, 1, most * per_group, width)
    out = F.scaled_dot_product_attention(rows, keys.flatten(0, 1).unsqueeze(1), values.flatten(0, 1).unsqueeze(1), attn_mask=mask)
    out = out.view(sequences, groups, most, per_group, width).transpose(1, 2).reshape(sequences * most, 1, -1)
    return out[places]


def later_rows(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A sequence's newest queries [s, g, p, d] to keys and values [g, k, d]: [s, 1, g * p * d].

    `mask` [1, 1, s * p, k] has a row for each query head, those of a token beside each other.
    """
    count, groups, per_group, width = query.shape
    rows = query.transpose(0, 1).reshape(groups, 1, count * per_group, width)
    out = F.scaled_dot_product_attention(rows, keys.unsqueeze(1), values.unsqueeze(1), attn_mask=mask)
    return out.view(groups, count, per_group, width).transpose(0, 1).reshape(count, 1, -1)


def first_rows(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A sequence's first tokens [s, g, p, d] to their own keys and values [g, s, d]: [s, 1, g * p * d].

    They may be thousands: without a `mask` [1, 1, s, s] (plain causal attention) nothing of size s * s is made.
    """
    rows = query.permute(1, 2, 0, 3)
    keys, values = (x.unsqueeze(1).expand_as(rows) for x in (keys, values))
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, is_causal=mask is None)
    return out.permute(2, 0, 1, 3).reshape(query.shape[0], 1, -1)
