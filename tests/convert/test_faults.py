"""Whatever is wrong with a source is an error that names the tensor or the field, and leaves no target behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eellm.errors import CheckpointError, ConfigError, ConversionError, UserError
from tests.convert.conversions import exported, imported
from tests.convert.hugging_face import save

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "llama"
    save("llama", folder)
    return folder


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "source"))


def refused(source: Path, error: type[UserError], *overrides: str) -> str:
    """What the import says; nothing is left beside the source."""
    target = source.parent / "target"
    before = sorted(source.parent.iterdir())
    with pytest.raises(error) as caught:
        imported(source, target, *overrides)
    assert sorted(source.parent.iterdir()) == before
    return str(caught.value)


def with_fields(source: Path, **fields: object) -> Path:
    file = source / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))
    return source


def with_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    file = source / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return source


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "gemma2"}, "model_type='gemma2': only llama, mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures=['LlamaForSequenceClassification']"),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu': only silu, gelu can be computed"),
        ({"num_local_experts": 8}, "num_local_experts=8: is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ({"attention_bias": True}, "attention_bias=True: biases in attention and MLP must go together"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type='yarn': only default, linear"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling.rope_type='dynamic'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5: all channels rotate"),
        ({"hidden_size": "absent"}, "hidden_size=None: config.json lacks it"),
    ],
)
def test_a_field_that_cannot_be_computed(fields: dict[str, object], said: str, source: Path) -> None:
    assert said in refused(with_fields(source, **fields), ConfigError)


def test_layers_that_attend_in_two_ways(tmp_path: Path) -> None:
    save("qwen2_window", tmp_path / "source")
    mixture = with_fields(tmp_path / "source", layer_types=["full_attention", "sliding_attention", "full_attention"])
    assert "layer_types=['full_attention', 'sliding_attention']: all layers must attend alike" in refused(mixture, ConfigError)
    mixture = with_fields(mixture, layer_types=None, max_window_layers=2)
    assert "max_window_layers=2: all of the 3 layers must have the window, or none" in refused(mixture, ConfigError)


def test_all_problems_at_once(source: Path) -> None:
    said = refused(with_fields(source, hidden_act="relu6", num_experts=4), ConfigError, "exits.layers=[1,7]", "convert.format=x")
    assert all(part in said for part in ("hidden_act", "convert.format"))
    said = refused(with_fields(source, num_experts="absent"), ConfigError, "exits.layers=[1,7]")
    assert all(part in said for part in ("hidden_act", "7 is not one of the layers 1..3"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(QUERY), f"{QUERY} is missing (looked for [32, 32])"),
        (lambda tensors: tensors.update({QUERY: torch.zeros(32, 31)}), f"{QUERY} is [32, 31] instead of [32, 32]"),
        (lambda tensors: tensors.update({QUERY: torch.zeros(32, 32).byte()}), f"{QUERY} holds uint8"),
        (
            lambda tensors: tensors.update({"extra.weight": torch.zeros(3)}),
            "extra.weight is in the source and nothing of the model",
        ),
        (lambda tensors: tensors.update({QUERY: torch.zeros(32, 32).half()}), f"{QUERY}, "),
    ],
)
def test_tensors_that_are_not_the_models(change: Callable, said: str, source: Path) -> None:
    assert said in refused(with_tensors(source, change), ConversionError)


def test_several_tensors_are_named_together(source: Path) -> None:
    said = refused(with_tensors(source, lambda tensors: [tensors.pop(QUERY), tensors.pop("lm_head.weight")]), ConversionError)
    assert all(f"{name} is missing" in said for name in (QUERY, "lm_head.weight"))


def test_buffers_of_old_files_are_no_weights(source: Path, tmp_path: Path) -> None:
    with_tensors(source, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    imported(source, tmp_path / "run")


def test_a_tied_output_matrix_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    save("smollm2", tmp_path / "source")

    def again(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    imported(with_tensors(tmp_path / "source", again), tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    other = with_tensors(tmp_path / "source", lambda tensors: tensors["lm_head.weight"].add_(1e-3))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(other, ConversionError)


def test_files_that_are_cut_or_missing(source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert f"{weights} is cut short or no safetensors file" in refused(source, ConversionError)
    weights.write_bytes(b"")
    assert f"{weights} is cut short or no safetensors file" in refused(source, ConversionError)
    weights.rename(source / "pytorch_model.bin")
    assert "looked for model.safetensors or model.safetensors.index.json" in refused(source, ConversionError)
    (source / "config.json").write_text("{")
    assert "config.json is no JSON" in refused(source, ConversionError)
    (source / "config.json").unlink()
    assert f"looked for {source / 'config.json'}, found " in refused(source, ConversionError)
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert "model.gguf is cut short or no GGUF file" in refused(tmp_path / "model.gguf", ConversionError)


def test_shards(tmp_path: Path) -> None:
    save("llama", tmp_path / "source", max_shard_size="20KB")
    source, index = tmp_path / "source", tmp_path / "source" / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    shard = places["weight_map"][QUERY]
    other = next(file for file in places["weight_map"].values() if file != shard)
    index.write_text(json.dumps({"weight_map": places["weight_map"] | {QUERY: other}}))
    assert f"{other} lacks {QUERY}" in refused(source, ConversionError)
    index.write_text(json.dumps(places))
    (source / shard).unlink()
    assert f"looked for {source / shard}, found nothing" in refused(source, ConversionError)


def test_ends_of_a_conversion(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match=r"convert\.target=.*: the folder is not empty"):
        imported(source, tmp_path / "full")
    with pytest.raises(CheckpointError, match="not a run directory"):
        exported(source, tmp_path / "folder")
    with pytest.raises(ConversionError, match="no such file or folder"):
        imported(tmp_path / "nothing", tmp_path / "run")


def test_a_model_that_no_family_can_say(saved_run: Path, tmp_path: Path) -> None:
    config = saved_run / "config.yaml"
    config.write_text(config.read_text().replace("activation: swiglu", "activation: squared_relu"))
    with pytest.raises(ConfigError, match=r"model\.activation=squared_relu: LlamaForCausalLM has swiglu"):
        exported(saved_run, tmp_path / "folder")
