"""Exits exported to transformers: what eellm decodes with them, their code decodes there, and every weight arrives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eellm.config.compose import compose
from eellm.convert.exit_files import export_exits
from eellm.convert.modeling_early_exit import exit_file
from eellm.decoding.continuation import Request
from eellm.errors import ConversionError
from eellm.mcore.checkpoint import load_stages
from eellm.mcore.whole_tensors import LazyTensor, read_checkpoint
from eellm.model.spec import ModelSpec, build_spec
from tests import workers
from tests.convert import hugging_face
from tests.convert.conversions import exported, imported, run_with_exits
from tests.decoding import models

PROMPT = (5, 17, 3, 42, 8)
COUNT = 24
MIXED = ("exits.layers=[1,2,3]", "exits.head=[mlp,block,norm]", "exits.tie_output=[true,false,false]")
MIXED += ("exits.temperature=[2.0,1.5,1.0]",)
BARE = ("exits.layers=[1,2]", "exits.head=[embedding,block]", "exits.tie_output=[false,true]", "exits.temperature=[3.0,1.0]")


def decode(rank: int, spec: ModelSpec, checkpoint: str, thresholds: tuple[float, ...]) -> list[tuple[list[int], list[int]]]:
    """(tokens, layers passed by each) of catch-up decoding at each threshold."""
    stage = models.build(spec)
    load_stages(Path(checkpoint), [stage])
    jobs = [
        models.Job(spec, models.policy(spec, "max_probability", threshold), Request(COUNT), prompt=PROMPT)
        for threshold in thresholds
    ]
    outcomes = [models.decode_with(stage, job) for job in jobs]
    return [([token.id for token in o.tokens], [token.exit_layer for token in o.tokens]) for o in outcomes]


def between(model: Any, rank: int) -> float:
    """A threshold between two of the first exit's probabilities on the full model's text, in ascending order."""
    text = model.generate(torch.tensor([PROMPT]), max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
    first = model.early_exits[0]
    sure = (model(text, output_exit_logits=True).exit_logits[first.layer] / first.temperature).softmax(-1).amax(-1)
    below, above = sure[0, len(PROMPT) :].sort().values[rank : rank + 2].tolist()
    return (below + above) / 2


@pytest.mark.dist
@pytest.mark.parametrize(
    ("row", "exits"),
    [*((row, MIXED) for row in hugging_face.MODELS), ("llama", BARE), ("gpt_neox", BARE)],
    ids=lambda value: value if isinstance(value, str) else "mixed" if value is MIXED else "bare",
)
def test_tokens_and_exits_are_those_of_eellm(row: str, exits: tuple[str, ...], tmp_path: Path) -> None:
    run, spec = run_with_exits(row, tmp_path, exits)
    model = AutoModelForCausalLM.from_pretrained(exported(run, tmp_path / "exported"), trust_remote_code=True)
    thresholds = (between(model, 1), between(model, COUNT // 2 - 1), 1.5)
    expected = workers.run(1, decode, spec, str(run / "checkpoints" / "step_0000000"), thresholds)[0]
    for threshold, (tokens, layers) in zip(thresholds, expected, strict=True):
        options = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
        out = model.generate(torch.tensor([PROMPT]), **options, exit_threshold=threshold)
        assert (out.sequences[0, len(PROMPT) :].tolist(), out.exit_layers) == (tokens, layers)
    assert len({layer for _, layers in expected[:2] for layer in layers[1:]}) > 1, "nothing has been shown"


def test_a_plain_load_knows_nothing_of_the_exits(tmp_path: Path) -> None:
    source = hugging_face.save("qwen3", tmp_path / "source")
    imported(tmp_path / "source", tmp_path / "run", *MIXED)
    plain, told = AutoModelForCausalLM.from_pretrained(
        exported(tmp_path / "run", tmp_path / "exported"), output_loading_info=True
    )
    assert not any(told.values())
    assert type(plain) is type(source)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_config_and_files_say_what_the_exits_are(tmp_path: Path) -> None:
    run, _ = run_with_exits("llama", tmp_path, MIXED)
    folder = exported(run, tmp_path / "exported")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_early_exit.EarlyExitForCausalLM"}
    assert config["early_exits"] == [
        {"layer": 1, "head": "mlp", "tie_output": True, "temperature": 2.0},
        {"layer": 2, "head": "block", "tie_output": False, "temperature": 1.5},
        {"layer": 3, "head": "norm", "tie_output": False, "temperature": 1.0},
    ]
    ours = read_checkpoint(run / "checkpoints" / "step_0000000")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("exits/*")} == {exit_file(n) for n in (1, 2, 3)}
    third = load_file(folder / exit_file(3))
    assert set(third) == {"norm.weight", "output.weight"}
    assert torch.equal(third["norm.weight"], ours["heads.exit_03.norm.weight"].read())
    assert torch.equal(third["output.weight"], ours["heads.exit_03.output.weight"].read()[: hugging_face.VOCABULARY])


def test_a_model_without_exits_brings_no_code(tmp_path: Path) -> None:
    hugging_face.save("llama", tmp_path / "source")
    imported(tmp_path / "source", tmp_path / "run")
    folder = exported(tmp_path / "run", tmp_path / "exported")
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".py" or path.name == "exits") == []
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"heads.exit_02.norm.weight": None}, "heads.exit_02.norm.weight is missing"),
        ({"heads.exit_02.norm.bias": LazyTensor.of(torch.zeros(32))}, "heads.exit_02.norm.bias is in the source and nothing of"),
        ({"heads.exit_02.norm.weight": LazyTensor.of(torch.zeros(31))}, r"heads.exit_02.norm.weight is \[31\] instead of \[32\]"),
    ],
)
def test_every_weight_of_an_exit_is_accounted_for(change: dict, reason: str, tmp_path: Path) -> None:
    spec = build_spec(compose(["task=train", "model.hidden_size=32", "model.num_attention_heads=2", "exits.layers=[2]"]), 61)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tensors = {"heads.exit_02.norm.weight": LazyTensor.of(torch.ones(32))} | change
    with pytest.raises(ConversionError, match=reason):
        export_exits(tmp_path, spec, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
