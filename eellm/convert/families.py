"""The families of models that can be imported and exported: one entry each, fields and weights, both directions. No torch.

Names of weights are those of modules: `.weight` and `.bias` follow from the model. Ours count layers from 1 (`{n}`), theirs
from 0 (`{i}`). How theirs become ours is said by name; `eellm.convert.weights` knows how it is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eellm.convert.fields import (
    Absent,
    Always,
    Biases,
    Choice,
    Derived,
    Field,
    Json,
    LearnedPositions,
    Named,
    Only,
    Rotary,
    Unsupported,
    Window,
)

Form = Literal["same", "rows", "transposed", "grouped", "thirds", "stacked"]


@dataclass(frozen=True)
class Weights:
    """Their modules that make one of ours: as they are (`same`), without the rows that pad our vocabulary (`rows`), stored
    as [in, out] (`transposed`), queries, keys and values that we group (`grouped`; `thirds`: in one transposed matrix),
    gate and up above each other (`stacked`)."""

    form: Form
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """`buffers`: tensors in their files that are no weights (patterns). `prefix`: what some files leave out of all names."""

    model_type: str
    architecture: str
    fields: tuple[Field, ...]
    weights: Mapping[str, Weights]
    buffers: str = r".*\.rotary_emb\.inv_freq"
    prefix: str = "model."

    def read(self, config: Json) -> tuple[dict[str, Any], list[Unsupported]]:
        """Our model's keys, as far as there is nothing wrong, and all that is."""
        model: dict[str, Any] = {}
        problems: list[Unsupported] = []
        named = config.get("architectures")
        if named and self.architecture not in named:
            problems.append(Unsupported("architectures", list(named), f"of {self.model_type} only {self.architecture}"))
        for field in (*self.fields, _FOREIGN):
            try:
                model.update(field.read(config))
            except Unsupported as problem:
                problems.append(problem)
            except KeyError as missing:  # something that follows from a field that is not there: said by that field itself
                if missing.args[0] in config:
                    raise
        return model, problems

    def write(self, model: Json) -> dict[str, Any]:
        """config.json of a model whose keys are all resolved, as far as the family can say it."""
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for field in self.fields:
            config.update(field.write(model))
        return config

    def loses(self, model: Json) -> list[Unsupported]:
        """What of our model the family cannot say: what is another thing after writing and reading it."""
        back, problems = self.read(self.write(model))
        lost = [key for key, value in back.items() if key != "init_std" and value != model[key]]
        return problems + [Unsupported(key, model[key], f"{self.architecture} has {back[key]}") for key in lost]


_FOREIGN = Absent(
    (
        *("num_experts", "num_local_experts", "n_routed_experts", "attn_logit_softcapping", "final_logit_softcapping"),
        *("quantization_config", "is_encoder_decoder", "clip_qkv", "no_rope_layers"),
    )
)


def _head_dim(config: Json) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


def _heads(config: Json) -> int:
    return config["num_attention_heads"]


_GATED = {"silu": "swiglu", "gelu": "geglu"}
_PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def _sizes() -> Iterator[Field]:
    yield Named("num_layers", "num_hidden_layers")
    yield Named("hidden_size", "hidden_size")
    yield Named("num_attention_heads", "num_attention_heads")
    yield Named("ffn_hidden_size", "intermediate_size")
    yield Named("vocab_size", "vocab_size")
    yield Named("max_positions", "max_position_embeddings")
    yield Named("init_std", "initializer_range", 0.02)
    yield Named("tie_embeddings", "tie_word_embeddings", False)


def _llama_like(norm_eps: float = 1e-6, qk_norm: str = "none") -> tuple[Field, ...]:
    return (
        *_sizes(),
        Named("num_query_groups", "num_key_value_heads", _heads),
        Choice("activation", "hidden_act", _GATED, "silu"),
        Always("norm", "rmsnorm"),
        Named("norm_eps", "rms_norm_eps", norm_eps),
        Always("residual", "sequential"),
        Always("qk_norm", qk_norm),
        Rotary(),
    )


_BEFORE = Always("norm_placement", "before")
_ANY_HEAD_DIM, _EQUAL_HEAD_DIM = Named("head_dim", "head_dim", _head_dim), Derived("head_dim", _head_dim)
_EVERYWHERE = Always("sliding_window", None)
_NO_BIAS = (Only("attention_bias", False), Always("qkv_bias", False), Always("linear_bias", False))


def _same(module: str) -> Weights:
    return Weights("same", (module,))


_ENDS = {
    "embedding.tokens": Weights("rows", ("model.embed_tokens",)),
    "heads.final.norm": _same("model.norm"),
    "output": Weights("rows", ("lm_head",)),
}
_ATTENTION = "model.layers.{i}.self_attn."
_SUB_LAYERS = {
    "layers.{n}.attention.linear_qkv": Weights("grouped", tuple(f"{_ATTENTION}{part}_proj" for part in "qkv")),
    "layers.{n}.attention.linear_proj": _same(f"{_ATTENTION}o_proj"),
    "layers.{n}.mlp.linear_fc1": Weights("stacked", ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj")),
    "layers.{n}.mlp.linear_fc2": _same("model.layers.{i}.mlp.down_proj"),
}
_LLAMA_WEIGHTS = {
    **_ENDS,
    **_SUB_LAYERS,
    "layers.{n}.attention_norm": _same("model.layers.{i}.input_layernorm"),
    "layers.{n}.mlp_norm": _same("model.layers.{i}.post_attention_layernorm"),
}
_QWEN3_WEIGHTS = {
    **_LLAMA_WEIGHTS,
    "layers.{n}.attention.q_layernorm": _same(f"{_ATTENTION}q_norm"),
    "layers.{n}.attention.k_layernorm": _same(f"{_ATTENTION}k_norm"),
}
_OLMO2_WEIGHTS = {
    **_ENDS,
    **_SUB_LAYERS,
    "layers.{n}.attention.q_norm": _same(f"{_ATTENTION}q_norm"),
    "layers.{n}.attention.k_norm": _same(f"{_ATTENTION}k_norm"),
    "layers.{n}.attention_norm": _same("model.layers.{i}.post_attention_layernorm"),
    "layers.{n}.mlp_norm": _same("model.layers.{i}.post_feedforward_layernorm"),
}
_GPT2_WEIGHTS = {
    "embedding.tokens": Weights("rows", ("transformer.wte",)),
    "embedding.positions": _same("transformer.wpe"),
    "layers.{n}.attention_norm": _same("transformer.h.{i}.ln_1"),
    "layers.{n}.attention.linear_qkv": Weights("thirds", ("transformer.h.{i}.attn.c_attn",)),
    "layers.{n}.attention.linear_proj": Weights("transposed", ("transformer.h.{i}.attn.c_proj",)),
    "layers.{n}.mlp_norm": _same("transformer.h.{i}.ln_2"),
    "layers.{n}.mlp.linear_fc1": Weights("transposed", ("transformer.h.{i}.mlp.c_fc",)),
    "layers.{n}.mlp.linear_fc2": Weights("transposed", ("transformer.h.{i}.mlp.c_proj",)),
    "heads.final.norm": _same("transformer.ln_f"),
    "output": Weights("rows", ("lm_head",)),
}
_NEOX_WEIGHTS = {
    "embedding.tokens": Weights("rows", ("gpt_neox.embed_in",)),
    "layers.{n}.attention_norm": _same("gpt_neox.layers.{i}.input_layernorm"),
    # a head's query, key and value stand together, which is our order where every query head has a key of its own
    "layers.{n}.attention.linear_qkv": _same("gpt_neox.layers.{i}.attention.query_key_value"),
    "layers.{n}.attention.linear_proj": _same("gpt_neox.layers.{i}.attention.dense"),
    "layers.{n}.mlp_norm": _same("gpt_neox.layers.{i}.post_attention_layernorm"),
    "layers.{n}.mlp.linear_fc1": _same("gpt_neox.layers.{i}.mlp.dense_h_to_4h"),
    "layers.{n}.mlp.linear_fc2": _same("gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
    "heads.final.norm": _same("gpt_neox.final_layer_norm"),
    "output": Weights("rows", ("embed_out",)),
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(  # Llama 2 and 3, SmolLM2
            "llama",
            "LlamaForCausalLM",
            (*_llama_like(), _BEFORE, _ANY_HEAD_DIM, _EVERYWHERE, Biases()),
            _LLAMA_WEIGHTS,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            (*_llama_like(), _BEFORE, _ANY_HEAD_DIM, Window(), Always("qkv_bias", False), Always("linear_bias", False)),
            _LLAMA_WEIGHTS,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            (
                *(*_llama_like(), _BEFORE, _EQUAL_HEAD_DIM, Window("use_sliding_window")),
                *(Always("qkv_bias", True), Always("linear_bias", False)),
            ),
            _LLAMA_WEIGHTS,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            (
                *(*_llama_like(qk_norm="head"), _BEFORE, Named("head_dim", "head_dim", 128)),
                *(Window("use_sliding_window"), *_NO_BIAS),
            ),
            _QWEN3_WEIGHTS,
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            (
                *(*_llama_like(1e-5, "projection"), Always("norm_placement", "after"), _EQUAL_HEAD_DIM),
                *(_EVERYWHERE, *_NO_BIAS),
            ),
            _OLMO2_WEIGHTS,
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            (
                Named("num_layers", "n_layer"),
                Named("hidden_size", "n_embd"),
                Named("num_attention_heads", "n_head"),
                Derived("num_query_groups", lambda config: config["n_head"]),
                Derived("head_dim", lambda config: config["n_embd"] // config["n_head"]),
                Named("ffn_hidden_size", "n_inner", lambda config: 4 * config["n_embd"]),
                Named("vocab_size", "vocab_size"),
                Named("max_positions", "n_positions", 1024),
                LearnedPositions(),
                Choice("activation", "activation_function", _PLAIN, "gelu_new"),
                Always("norm", "layernorm"),
                Named("norm_eps", "layer_norm_epsilon", 1e-5),
                _BEFORE,
                Always("residual", "sequential"),
                Always("qk_norm", "none"),
                Always("qkv_bias", True),
                Always("linear_bias", True),
                _EVERYWHERE,
                Named("tie_embeddings", "tie_word_embeddings", True),
                Named("init_std", "initializer_range", 0.02),
                Only("scale_attn_weights", True),
                Only("scale_attn_by_inverse_layer_idx", False),
                Only("add_cross_attention", False),
            ),
            _GPT2_WEIGHTS,
            buffers=r".*\.attn\.(bias|masked_bias)",
            prefix="transformer.",
        ),
        Family(  # Pythia too
            "gpt_neox",
            "GPTNeoXForCausalLM",
            (
                *_sizes(),
                Derived("num_query_groups", _heads),
                _EQUAL_HEAD_DIM,
                Choice("activation", "hidden_act", {"gelu": "gelu", **_PLAIN}, "gelu"),
                Always("norm", "layernorm"),
                Named("norm_eps", "layer_norm_eps", 1e-5),
                _BEFORE,
                Choice("residual", "use_parallel_residual", {True: "parallel", False: "sequential"}, True),
                Always("qk_norm", "none"),
                Rotary("rotary_emb_base", "rotary_pct", 0.25),
                Only("attention_bias", True),
                Always("qkv_bias", True),
                Always("linear_bias", True),
                _EVERYWHERE,
            ),
            _NEOX_WEIGHTS,
            buffers=r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
            prefix="gpt_neox.",
        ),
    )
}


def family_named(config: Json) -> Family:
    """The family that config.json names. Raises Unsupported."""
    name = config.get("model_type")
    if name not in FAMILIES:
        raise Unsupported("model_type", name, f"only {', '.join(FAMILIES)} can be read")
    return FAMILIES[name]


def family_of(model: Json) -> tuple[Family, list[Unsupported]]:
    """The first family that is able to say all of a resolved model, or the one that lacks least, with what it lacks."""
    losses = [(family, family.loses(model)) for family in FAMILIES.values()]
    return min(losses, key=lambda pair: len(pair[1]))
