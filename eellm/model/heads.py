"""Output heads: the final one and the exits are one class.

A head turns hidden states into features and names the output matrix they are multiplied with. Kinds
(EE-Tuning, arXiv 2402.00518, section 3.2): `embedding` nothing but the matrix; `norm` a norm before it;
`mlp` a residual MLP before the norm; `block` a whole decoder layer before the norm.
"""

from __future__ import annotations

import torch

from eellm.mcore.parts import (
    MegatronModule,
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    make_sharded_tensors_for_checkpoint,
    set_tensor_model_parallel_attributes,
)
from eellm.model.context import Context
from eellm.model.layer import DecoderLayer, build_mlp, with_bias
from eellm.model.norm import model_norm
from eellm.model.spec import ExitSpec, ModelSpec


class OutputMatrix(MegatronModule):
    """[padded vocabulary / tp, h], rows split over tensor-parallel ranks. Calling it returns the weight, so that
    megatron-core's pre-forward hooks (overlapped parameter gathering) see every use."""

    def __init__(self, spec: ModelSpec, config: TransformerConfig):
        super().__init__(config)
        rows = spec.padded_vocab_size // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.empty(rows, spec.hidden_size))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self) -> torch.nn.Parameter:
        return self.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class Head(MegatronModule):
    """`exit_` None makes the final head. `output` is the own matrix of an untied exit, else None."""

    def __init__(self, spec: ModelSpec, config: TransformerConfig, exit_: ExitSpec | None):
        super().__init__(config)
        kind = "norm" if exit_ is None else exit_.head
        self.name = "final" if exit_ is None else exit_.name
        self.temperature = 1.0 if exit_ is None else exit_.temperature
        self.layer = spec.num_layers if exit_ is None else exit_.layer
        self.block = DecoderLayer(spec, config, self.name, spec.num_layers + self.layer) if kind == "block" else None
        self.mlp_norm = model_norm(spec, config.sequence_parallel) if kind == "mlp" else None
        self.mlp = build_mlp(spec, config) if kind == "mlp" else None
        self.norm = model_norm(spec, config.sequence_parallel) if kind != "embedding" else None
        self.output = OutputMatrix(spec, config) if exit_ is not None and not exit_.tie_output else None

    def features(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        """[s, b, h] -> [s, b, h], whole sequences on every tensor-parallel rank, ready for its slice of the output matrix."""
        if self.block is not None:
            hidden = self.block(hidden, context)
        if self.mlp is not None and self.mlp_norm is not None:
            hidden = hidden + with_bias(self.mlp(self.mlp_norm(hidden)))
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.config.tensor_model_parallel_size == 1:
            return hidden
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region(hidden)
