"""The pieces of megatron-core from which our modules are composed, and the TransformerConfig they share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from megatron.core.utils import make_viewless_tensor

from eellm.layout import ParallelLayout
from eellm.mcore.cpu import cpu_stand_ins
from eellm.model.spec import ModelSpec

__all__ = [
    "MLP",
    "AttnMaskType",
    "ColumnParallelLinear",
    "MLPSubmodules",
    "MegatronModule",
    "ModelType",
    "RowParallelLinear",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "TransformerConfig",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "make_sharded_tensors_for_checkpoint",
    "make_viewless_tensor",
    "scatter_to_sequence_parallel_region",
    "set_tensor_model_parallel_attributes",
    "sharded_state_dict_default",
    "transformer_config",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "squared_relu": _squared_relu,
}


def _leave(weight: torch.Tensor) -> torch.Tensor:
    """mcore marks a parameter as tensor parallel only where it initialises it; the values are ours (`eellm.model.initialise`)."""
    return weight


def transformer_config(spec: ModelSpec, layout: ParallelLayout, dtype: str = "fp32", on_cpu: bool = True) -> TransformerConfig:
    """megatron-core's view of a model and layout; weights get their values from `eellm.model.initialise`."""
    with cpu_stand_ins():
        return TransformerConfig(
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            num_attention_heads=spec.num_heads,
            num_query_groups=spec.num_query_groups,
            kv_channels=spec.head_dim,
            ffn_hidden_size=spec.ffn_hidden_size,
            gated_linear_unit=spec.gated,
            activation_func=ACTIVATIONS[spec.activation],
            add_bias_linear=spec.linear_bias,
            add_qkv_bias=spec.qkv_bias,
            qk_layernorm=spec.qk_norm == "head",  # tells mcore to sum their gradients over tensor-parallel ranks
            normalization="RMSNorm" if spec.norm == "rmsnorm" else "LayerNorm",
            layernorm_epsilon=spec.norm_eps,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
            sequence_parallel=layout.sequence_parallel,
            params_dtype=DTYPES[dtype],
            pipeline_dtype=DTYPES[dtype],
            bf16=dtype == "bf16",
            fp16=dtype == "fp16",
            use_cpu_initialization=on_cpu,
            init_method=_leave,
            output_layer_init_method=_leave,
            embedding_init_method=_leave,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            deallocate_pipeline_outputs=True,
            calculate_per_token_loss=True,
            # gloo pairs the messages of batched p2p wrongly, and silently, when both neighbours are the same rank
            batch_p2p_comm=not on_cpu,
            batch_p2p_sync=not on_cpu,
        )
