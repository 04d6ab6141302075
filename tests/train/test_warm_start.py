"""Warm start: every tensor of the new model is the old run's, a copy of one, or as from scratch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import workers
from tests.train.saved_states import refusal, save_initial, whole_tensors

SOURCE = ["seed=5"]  # not what a run from scratch has
OTHER_EXITS = ["exits.layers=[2,3,4]", "exits.head=[block,norm,mlp]", "exits.tie_output=[false,false,true]"]
LAYOUTS = {
    "single distributed bf16": (1, ["optimizer=adam_distributed", "precision=bf16"]),
    "tp2": (2, ["parallel=tp2"]),
    "pp2_vp2": (2, ["parallel=pp2_vp2"]),
    "pp2_dp2": (4, ["parallel=pp2", "parallel.dp=2"]),
}
COPIED = {
    "heads.exit_02.block.": "layers.4.",
    "heads.exit_02.norm.": "heads.final.norm.",
    "heads.exit_02.output.": "embedding.tokens.",
    "heads.exit_04.mlp": "layers.4.mlp",
    "heads.exit_04.norm.": "heads.final.norm.",
}
"""Where exits that the source does not have copy from; its exit_02 has an MLP, a norm and no matrix of its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("warm")


def saved(folder: Path, name: str, world: int, overrides: list[str], source: Path | None = None) -> tuple[Path, str]:
    target = folder / f"step_{name}"
    args = [overrides, str(folder / "cache"), str(target)] + ([] if source is None else [str(source)])
    return target, workers.run(world, save_initial, *args)[0]


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    """Exits after 1 (the model's matrix only), 2 (MLP) and 3 (norm, own matrix)."""
    return saved(folder, "source", 1, SOURCE)[0]


@pytest.mark.dist
@pytest.mark.parametrize("init", ["copy", "random"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_from_where_it_should_be(layout: str, init: str, source: Path, folder: Path) -> None:
    if init == "random" and layout != "tp2":
        pytest.skip("what stays as initialised does not depend on how the rest was loaded")
    world, overrides = LAYOUTS[layout]
    target, said = saved(folder, f"{layout}_{init}", world, [*overrides, *OTHER_EXITS, f"exits.init={init}"], source)
    assert said.endswith(f"{source}, exits: kept exit_03; completed (init={init}) exit_02; added (init={init}) exit_04")
    old, new = whole_tensors(source, folder), whole_tensors(target, folder)
    scratch = (
        whole_tensors(saved(folder, "scratch", 1, [*OTHER_EXITS, "exits.init=random"])[0], folder) if init == "random" else {}
    )
    for name, tensor in new.items():
        if name.startswith("optimizer.state.fp32_param."):
            assert torch.equal(tensor, new[name.removeprefix("optimizer.state.fp32_param.")].float()), name
        elif name.startswith("optimizer."):
            assert not tensor.any(), f"{name}: the optimizer starts afresh"
        else:
            expected = old.get(name)
            if expected is None and init == "copy":
                prefix = next(prefix for prefix in COPIED if name.startswith(prefix))
                expected = old[COPIED[prefix] + name.removeprefix(prefix)]
            elif expected is None:
                expected = scratch[name]
            assert torch.equal(tensor, expected.to(tensor.dtype)), name


@pytest.mark.dist
def test_only_exits_may_differ(source: Path, folder: Path) -> None:
    cases = {
        "model.num_layers=6": "looked for layers.5",
        "model.num_layers=3": "it also has layers.4",
        "model.hidden_size=48": "differ in shape",
    }
    for overrides, words in cases.items():
        exits = ["exits.layers=[1,2]", "exits.head=norm", "exits.tie_output=true"]
        said = set(workers.run(2, refusal, [overrides, *exits, "parallel=tp2"], str(folder / "cache"), str(source), True))
        assert len(said) == 1, "every rank raises the same"
        assert words in said.pop()
