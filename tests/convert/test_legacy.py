"""EE-LLM's checkpoints, built here by the names that its code gives them; real ones were not at hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from eellm.errors import ConfigError, UserError
from tests import workers
from tests.convert import our_logits
from tests.convert.conversions import imported
from tests.convert.hugging_face import build, logits, token_ids
from tests.convert.test_parity import difference

LAYERS, TP, PP = 4, 2, 2


class Elsewhere:
    """A class that a checkpoint names and that is not there when it is read."""


def llama() -> Any:
    model = build("llama")
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": LAYERS, "intermediate_size": 48})
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def mixed(weights: dict[str, torch.Tensor], prefix: str, config: Any) -> torch.Tensor:
    """Queries, key and value group by group."""
    groups, width = config.num_key_value_heads, config.head_dim
    parts = [weights[f"{prefix}self_attn.{part}_proj.weight"].unflatten(0, (groups, -1, width)) for part in "qkv"]
    return torch.cat(parts, dim=1).flatten(0, 2)


def cut(tensor: torch.Tensor, rank: int, dim: int = 0) -> torch.Tensor:
    return tensor.chunk(TP, dim)[rank].clone()


def stage_of(model: Any, exits: dict[int, dict[str, torch.Tensor]], stage: int, rank: int) -> dict[str, Any]:
    """`language_model` as one rank saves it. `exits`: number of the layer that carries one -> its norm and output matrix."""
    weights, config = model.state_dict(), model.config
    encoder, outputs, per_stage = {}, {}, LAYERS // PP
    for place in range(per_stage):
        layer, ours = stage * per_stage + place, f"layers.{place}."
        theirs = f"model.layers.{layer}."
        gate, up = (weights[f"{theirs}mlp.{half}_proj.weight"] for half in ("gate", "up"))
        encoder |= {
            f"{ours}input_norm.weight": weights[f"{theirs}input_layernorm.weight"],
            f"{ours}post_attention_norm.weight": weights[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}self_attention.query_key_value.weight": cut(mixed(weights, theirs, config), rank),
            f"{ours}self_attention.dense.weight": cut(weights[f"{theirs}self_attn.o_proj.weight"], rank, 1),
            f"{ours}mlp.dense_h_to_4h.weight": torch.cat([cut(gate, rank), cut(up, rank)]),
            f"{ours}mlp.dense_4h_to_h.weight": cut(weights[f"{theirs}mlp.down_proj.weight"], rank, 1),
        }
        if layer + 1 in exits:
            encoder[f"{ours}exit_norm.weight"] = exits[layer + 1]["norm"]
            outputs[f"{len(outputs)}.weight"] = cut(exits[layer + 1]["output"], rank)
    found: dict[str, Any] = {"encoder": encoder}
    if stage == 0:
        found["embedding"] = {"word_embeddings": {"weight": cut(weights["model.embed_tokens.weight"], rank)}}
    if stage == PP - 1:
        encoder["final_norm.weight"] = weights["model.norm.weight"]
        found["output_layer"] = {"weight": cut(weights["lm_head.weight"], rank)}
    return {**found, "exit_output_layer": outputs} if outputs else found


def write(model: Any, folder: Path, exits: dict[int, dict[str, torch.Tensor]], **changes: Any) -> Path:
    config = model.config
    args = {
        **{"num_layers": LAYERS, "hidden_size": config.hidden_size, "ffn_hidden_size": config.intermediate_size},
        **{"num_attention_heads": config.num_attention_heads, "group_query_attention": True},
        **{"num_query_groups": config.num_key_value_heads, "kv_channels": config.head_dim, "seq_length": 64},
        **{"max_position_embeddings": 64, "padded_vocab_size": config.vocab_size, "norm_epsilon": config.rms_norm_eps},
        **{"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope"},
        **{"rotary_percent": 1.0, "untie_embeddings_and_output_weights": True, "untie_exit_output_weights": True},
        **{"exit_layer_nums": sorted(exits), "use_exit_norm": True, "use_exit_mlp": False, "pre_exit": False},
        **{"model_type": Elsewhere(), "params_dtype": torch.float32},
    }
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("7\n")
    for stage in range(PP):
        for rank in range(TP):
            place = folder / "iter_0000007" / f"mp_rank_{rank:02d}_{stage:03d}"
            place.mkdir(parents=True)
            saved = {"args": argparse.Namespace(**args | changes), "checkpoint_version": 3.0, "iteration": 7}
            saved["model"] = {"language_model": stage_of(model, exits, stage, rank)}
            saved["rng_state"] = [{"np_rng_state": np.random.get_state(), "other": Elsewhere()}]
            torch.save(saved, place / "model_optim_rng.pt")
    return folder


@pytest.fixture(scope="module")
def model() -> Any:
    """With an even vocabulary, which two ranks share."""
    return _even(llama())


def _even(model: Any) -> Any:
    model.resize_token_embeddings(60)
    return model.eval()


def test_backbone_and_exits_compute_what_they_did(model: Any, tmp_path: Path) -> None:
    exits = {layer: {"norm": torch.rand(32) + 0.5, "output": torch.randn(60, 32)} for layer in (1, 3, 4)}
    spec = imported(write(model, tmp_path / "legacy", exits), tmp_path / "run", "convert.source=" + str(tmp_path / "legacy"))
    assert [(exit_.layer, exit_.head, exit_.tie_output) for exit_ in spec.exits] == [(n, "norm", False) for n in (1, 3, 4)]
    ids = token_ids() % 60
    heads = workers.run(1, our_logits.whole_sequences, str(tmp_path / "run"), [], ids.numpy())[0]
    assert difference(heads["final"], logits(model, ids)) < 1e-5
    with torch.no_grad():
        states = model(ids, output_hidden_states=True)
    for layer in (1, 3):
        hidden = states.hidden_states[layer]
        normed = torch.nn.functional.rms_norm(hidden, (32,), exits[layer]["norm"], model.config.rms_norm_eps)
        assert difference(heads[f"exit_0{layer}"], normed @ exits[layer]["output"].T) < 1e-5


def test_exits_before_a_layer_are_exits_after_the_one_before(model: Any, tmp_path: Path) -> None:
    exits = {layer: {"norm": torch.rand(32), "output": torch.randn(60, 32)} for layer in (2, 4)}
    spec = imported(write(model, tmp_path / "legacy", exits, pre_exit=True), tmp_path / "run")
    assert spec.exit_layers == [1, 3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_exit_mlp": True}, "use_exit_mlp=True"),
        ({"use_exit_block": True}, "use_exit_block=True"),
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm'"),
        ({"add_bias_linear": True}, "add_bias_linear=True"),
    ],
)
def test_what_cannot_be_converted_is_named(changes: dict[str, Any], words: str, model: Any, tmp_path: Path) -> None:
    source = write(model, tmp_path / "legacy", {}, **changes)
    with pytest.raises((UserError, ConfigError), match=words):
        imported(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_rank_and_a_cut_file_are_named(model: Any, tmp_path: Path) -> None:
    source = write(model, tmp_path / "legacy", {})
    file = source / "iter_0000007" / "mp_rank_01_001" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="mp_rank_01_001"):
        imported(source, tmp_path / "run")
    file.unlink()
    file.parent.rmdir()
    with pytest.raises(UserError, match="tensor-parallel rank 1, stage 1"):
        imported(source, tmp_path / "run")
