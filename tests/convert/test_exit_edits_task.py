"""task=convert from a run to a run: exits added, moved and dropped, against renaming by hand and the source's own logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from eellm.config.compose import compose
from eellm.errors import CheckpointError, ConfigError, ConversionError
from tests import workers
from tests.convert import our_logits
from tests.convert.conversions import converted, exported, run_with_exits, weights
from tests.convert.hugging_face import token_ids

EXITS = ("exits.layers=[1,2]", "exits.head=[mlp,norm]", "exits.tie_output=[true,false]", "exits.temperature=[2.0,1.5]")
EDIT = ("convert.move={2: 3}", "exits.layers=[0.6,1.0]", "exits.init=copy")
"""exit_01 goes, exit_02 becomes exit_03, and there is a new exit_02."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_with_exits("llama", tmp_path_factory.mktemp("edits"), (*EXITS, "model.vocab_multiple=1"))[0]


def exits_in(run: Path) -> dict[str, object]:
    return yaml.safe_load((run / "config.yaml").read_text())["exits"]


def check(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert [name for name in got if got[name].dtype != wanted[name].dtype or not torch.equal(got[name], wanted[name])] == []


def heads(run: Path, world: int, *overrides: str) -> dict[str, np.ndarray]:
    """Logits of every head, over the ranks."""
    found: dict[str, np.ndarray] = {}
    for rank in workers.run(world, our_logits.whole_sequences, str(run), list(overrides), token_ids().numpy()):
        found |= rank
    return found


def test_what_changes_nothing_is_a_copy(source: Path, tmp_path: Path) -> None:
    given = {"chat_template.jinja": "{{ messages }}", "tokenizer_config.json": "{}"}
    shutil.copytree(source, tmp_path / "source")
    for name, text in given.items():
        (tmp_path / "source" / name).write_text(text)
    run = converted(tmp_path / "source", tmp_path / "copy")
    check(weights(run), weights(source))
    assert exits_in(run.path) == exits_in(source)
    assert run.status()["state"] == "done"
    assert {name: (run.path / name).read_text() for name in given} == given
    assert "task=convert" in run.overrides.read_text().splitlines()


@pytest.mark.dist
def test_add_move_and_drop_at_once(source: Path, tmp_path: Path) -> None:
    run = converted(source, tmp_path / "run", *EDIT, "seed=7")
    before = weights(source)
    wanted = {name: tensor for name, tensor in before.items() if not name.startswith("heads.exit_")}
    wanted |= {f"heads.exit_03.{part}": before[f"heads.exit_02.{part}"] for part in ("norm.weight", "output.weight")}
    wanted["heads.exit_02.norm.weight"] = before["heads.final.norm.weight"]
    check(weights(run), wanted)
    kept = exits_in(run.path)
    assert {key: kept[key] for key in ("head", "tie_output", "temperature")} == {
        "head": "norm",
        "tie_output": [True, False],
        "temperature": [1.0, 1.5],
    }
    config = compose(["task=generate", f"checkpoint={run.path}"])
    assert config.exits.layers == [0.6, 1.0]

    here, there = heads(run.path, 1), heads(source, 1)
    assert list(here) == ["exit_02", "exit_03", "final"]
    assert np.array_equal(here["final"], there["final"])
    staged = heads(run.path, 2, "parallel=pp2", "parallel.layers_per_stage=[2,1]", "decoding=pipeline")
    assert {name: here[name].shape for name in here} == {name: staged[name].shape for name in staged}
    assert max(np.abs(here[name] - staged[name]).max() / np.abs(here[name]).max() for name in here) < 1e-5


@pytest.mark.dist
def test_what_stays_computes_what_it_did(source: Path, tmp_path: Path) -> None:
    """An exit that stays keeps its kind of head too, unless the command line gives another."""
    run = converted(source, tmp_path / "run", "exits.layers=[1,3]")
    assert exits_in(run.path)["head"] == ["mlp", "norm"]
    here, there = heads(run.path, 1), heads(source, 1)
    assert list(here) == ["exit_01", "exit_03", "final"]
    assert all(np.array_equal(here[name], there[name]) for name in ("exit_01", "final"))
    bare = converted(run.path, tmp_path / "bare", "exits=none")
    check(weights(bare), {name: tensor for name, tensor in weights(source).items() if not name.startswith("heads.exit_")})


def test_exits_that_only_move(source: Path, tmp_path: Path) -> None:
    run = converted(source, tmp_path / "run", "convert.move={1: 2, 2: 1}")
    swap = {"heads.exit_01.": "heads.exit_02.", "heads.exit_02.": "heads.exit_01."}
    check(weights(run), {swap.get(name[:14], name[:14]) + name[14:]: tensor for name, tensor in weights(source).items()})
    assert (exits_in(run.path)["layers"], exits_in(run.path)["head"]) == ([1, 2], ["norm", "mlp"])


@pytest.mark.parametrize(
    ("overrides", "reasons"),
    [
        (["convert.move={3: 1}"], ["convert.move={3: 1}: no exit after layer 3", "would lose its weights"]),
        (["convert.move={1: 7}"], ["7 is not one of the layers 1..3"]),
        (["convert.move={1: 0}", "seed=x"], ["convert.move", "a number, at least 1", "seed=x"]),
        (["convert.move=3"], ["convert.move=3: must be"]),
        (["convert.move={1: 3}", "exits.layers=[2]"], ["has none there"]),
        (["exits.head=norm", "exits.layers=[1,9]"], ["its mlp would be lost", "9 is not one of the layers 1..3"]),
        (["exits.tie_output=true"], ["output matrix of its own, which would be lost"]),
        (["exits.head=[norm,norm,norm]"], ["a list of 3 for 2 exits"]),
        (["model.vocab_multiple=8"], ["`model` comes from the run"]),
        (["model.num_layers=8"], ["`model` comes from the run"]),
        (["convert.format=huggingface", "convert.move={1: 3}"], ["convert.format=huggingface never reads it"]),
    ],
)
def test_refusals(overrides: list[str], reasons: list[str], source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        converted(source, tmp_path / "run", *overrides)
    assert [reason for reason in reasons if reason not in str(refused.value)] == [], str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_whole(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    next((tmp_path / "source" / "checkpoints").rglob("*.distcp")).unlink()
    with pytest.raises(CheckpointError):
        converted(tmp_path / "source", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", ["llama", "smollm2", "gpt2", "gpt_neox"])
def test_exits_come_back_from_transformers(row: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every tensor of a run, through `transformers` and back, is what it was; the folder may lie in the run."""
    exits = ("exits.layers=[1,2,3]", "exits.head=[mlp,block,norm]", "exits.tie_output=[true,false,false]")
    exits += ("exits.temperature=[2.0,1.5,1.0]", "model.vocab_multiple=1")
    run, _ = run_with_exits(row, tmp_path, exits, dtype)
    folder = exported(run, run / "exported")
    back = converted(folder, tmp_path / "back", "model.vocab_multiple=1")
    check(weights(back), weights(run))
    assert {weight.dtype for weight in weights(back).values()} == {dtype}
    keys = ("layers", "head", "tie_output", "temperature")
    assert {key: exits_in(back.path)[key] for key in keys} == {key: exits_in(run)[key] for key in keys}


def test_exits_from_transformers_are_edited_too(source: Path, tmp_path: Path) -> None:
    folder = exported(source, tmp_path / "folder")
    edited = converted(folder, tmp_path / "edited", *EDIT, "model.vocab_multiple=1")
    check(weights(edited), weights(converted(source, tmp_path / "wanted", *EDIT)))
    with pytest.raises(ConfigError, match="no exit after layer 3"):
        converted(folder, tmp_path / "refused", "convert.move={3: 2}")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"layer": 1, "head": "norm"}, "an exit has layer, head, tie_output, temperature"),
        (
            {"layer": 1, "head": "lens", "tie_output": True, "temperature": 1.0},
            "only embedding, norm, mlp, block can be computed",
        ),
        ({"layer": 1.5, "head": "norm", "tie_output": True, "temperature": 1.0}, "early_exits.layer=1.5: must be int"),
        ({"layer": 2, "head": "norm", "tie_output": False, "temperature": 1.0}, "more than one exit after a layer"),
    ],
)
def test_exits_that_config_json_describes_wrongly(entry: dict, said: str, source: Path, tmp_path: Path) -> None:
    folder = exported(source, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["early_exits"].append(entry)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=said):
        converted(folder, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_files_of_exits_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    folder = exported(source, tmp_path / "folder")
    (folder / "exits" / "exit_01.safetensors").rename(folder / "exits" / "old")
    with pytest.raises(ConversionError, match=r"looked for .*exits/exit_01\.safetensors, found nothing"):
        converted(folder, tmp_path / "missing")
    shutil.copyfile(folder / "exits" / "exit_02.safetensors", folder / "exits" / "exit_01.safetensors")
    with pytest.raises(ConversionError) as refused:
        converted(folder, tmp_path / "other")
    assert "exits/exit_01.safetensors: mlp_norm.weight is missing" in str(refused.value)
    assert "exits/exit_01.safetensors: output.weight is in the source and nothing of the model" in str(refused.value)
    assert not (tmp_path / "missing").exists()
    assert not (tmp_path / "other").exists()
