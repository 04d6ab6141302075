"""Output heads as decoding runs them: what stands between hidden states and an output matrix, over `Head`'s parameters."""

from __future__ import annotations

import torch

from eellm.decoding.model.lean_layer import DecodingContext, LeanLayer, LeanMLP, LeanNorm
from eellm.model.spec import ModelSpec
from eellm.model.stage import Readout


class LeanHead:
    """`block` is the decoder layer inside the head, if it has one."""

    def __init__(self, readout: Readout, spec: ModelSpec):
        head, tp_group = readout.head, readout.vocabulary.group
        self.block = None if head.block is None else LeanLayer(head.block, spec, tp_group)
        self.mlp = None if head.mlp is None else LeanMLP(head.mlp, spec, tp_group)
        self.mlp_norm = None if head.mlp_norm is None else LeanNorm(head.mlp_norm)
        self.norm = None if head.norm is None else LeanNorm(head.norm)

    def features(self, hidden: torch.Tensor, context: DecodingContext | None = None) -> torch.Tensor:
        """[r, 1, h] -> [r, 1, h], ready for the output matrix; a head with a block needs the rows' context."""
        if self.block is not None:
            assert context is not None, "a block attends to the tokens before"
            hidden = self.block(hidden, context)
        if self.mlp is not None and self.mlp_norm is not None:
            hidden = self.mlp(self.mlp_norm(hidden)).add_(hidden)
        return hidden if self.norm is None else self.norm(hidden)
