"""The decoder layer: attention and MLP with the residual and norm placements of Llama, GPT-2, GPT-NeoX and OLMo2."""

from __future__ import annotations

import torch

from eellm.mcore.parts import MLP, ColumnParallelLinear, MegatronModule, MLPSubmodules, RowParallelLinear, TransformerConfig
from eellm.model.attention import Attention
from eellm.model.context import Context
from eellm.model.norm import model_norm
from eellm.model.spec import ModelSpec


def build_mlp(spec: ModelSpec, config: TransformerConfig) -> MLP:
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return MLP(config, submodules, ffn_hidden_size=spec.ffn_hidden_size)


def with_bias(result: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    """mcore's linear layers hand their bias out to be added after the tensor-parallel reduction."""
    out, bias = result
    return out if bias is None else out + bias


class DecoderLayer(MegatronModule):
    """`name` is the layer's key in a KV cache; `number` (1-based) identifies it to mcore."""

    def __init__(self, spec: ModelSpec, config: TransformerConfig, name: str, number: int):
        super().__init__(config)
        self.name = name
        self.norm_after = spec.norm_placement == "after"
        self.parallel_residual = spec.residual == "parallel"
        self.attention_norm = model_norm(spec, config.sequence_parallel)
        self.attention = Attention(spec, config, number)
        self.mlp_norm = model_norm(spec, config.sequence_parallel)
        self.mlp = build_mlp(spec, config)

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]; s is divided by tp under sequence parallelism."""
        attended = self._attend(hidden, context)
        if self.parallel_residual:
            return hidden + attended + self._transform(hidden)
        hidden = hidden + attended
        return hidden + self._transform(hidden)

    def _attend(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        if self.norm_after:
            return self.attention_norm(with_bias(self.attention(hidden, context)))
        return with_bias(self.attention(self.attention_norm(hidden), context))

    def _transform(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.norm_after:
            return self.mlp_norm(with_bias(self.mlp(hidden)))
        return with_bias(self.mlp(self.mlp_norm(hidden)))
