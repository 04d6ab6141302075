"""Exits added, moved and dropped, against renaming by hand, training's own initial values, and every layout that loads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eellm.convert.exit_edits import edited_tensors
from eellm.convert.exit_origins import edit_problems, moved
from eellm.decoding.continuation import Request
from eellm.engine.chunks import build_stages
from eellm.errors import ConversionError
from eellm.layout import ParallelLayout
from eellm.mcore.checkpoint import load_stages, model_state
from eellm.mcore.checkpoint_writer import CheckpointWriter
from eellm.mcore.groups import init_groups
from eellm.mcore.parts import transformer_config
from eellm.mcore.whole_tensors import LazyTensor, read_checkpoint, write_checkpoint
from eellm.model.shapes import parameter_shapes
from eellm.model.spec import ExitSpec, ModelSpec, plan_stages, tied_stages
from eellm.model.stage import Stage
from tests import workers
from tests.decoding import models, oracle

SEED, NEW_SEED = 5, 6
OLD = (ExitSpec(1, "mlp"), ExitSpec(2, "block", tie_output=False, temperature=0.7), ExitSpec(3))


def spec(*exits: ExitSpec, init: str = "copy") -> ModelSpec:
    return models.spec(exits=exits, exit_init=init)


def numbers(model: ModelSpec) -> dict[str, LazyTensor]:
    """No two tensors alike."""
    generator = torch.Generator().manual_seed(SEED)
    shapes = parameter_shapes(model)
    return {name: LazyTensor.of(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def check(after: dict[str, LazyTensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(after) == list(expected)
    different = [name for name, tensor in after.items() if not torch.equal(tensor.read(), expected[name])]
    assert different == []


def test_what_stays_keeps_its_bytes_and_what_is_dropped_is_gone() -> None:
    before, after = spec(*OLD), spec(OLD[1])
    tensors = numbers(before)
    edited = edited_tensors(tensors, before, after, {}, NEW_SEED)
    check(edited, {name: tensors[name].read() for name in parameter_shapes(after)})
    assert not any(name.startswith(("heads.exit_01", "heads.exit_03")) for name in edited)


@pytest.mark.parametrize("moves", [{2: 4}, {1: 2, 2: 1}, {1: 3, 3: 4, 2: 1}])
def test_all_of_an_exit_moves_together(moves: dict[int, int]) -> None:
    before = spec(*OLD)
    after = spec(*moved(OLD, moves))
    tensors = numbers(before)
    expected = {}
    for name in parameter_shapes(after):
        source = name
        for old, new in moves.items():
            if name.startswith(f"heads.exit_{new:02d}."):
                source = name.replace(f"exit_{new:02d}", f"exit_{old:02d}")
        expected[name] = tensors[source].read()
    check(edited_tensors(tensors, before, after, moves, NEW_SEED), expected)


def test_new_parts_are_copies_of_the_backbone() -> None:
    """A whole new exit of every kind, and an exit that gets an output matrix of its own."""
    before = spec(ExitSpec(1))
    after = spec(
        ExitSpec(1, tie_output=False), ExitSpec(2, "mlp"), ExitSpec(3, "block", tie_output=False), ExitSpec(4, "embedding")
    )
    tensors = numbers(before)
    sources = {
        "heads.exit_01.output.weight": "embedding.tokens.weight",
        "heads.exit_02.norm.weight": "heads.final.norm.weight",
        "heads.exit_02.mlp_norm.weight": "layers.2.mlp_norm.weight",
        "heads.exit_02.mlp.linear_fc1.weight": "layers.2.mlp.linear_fc1.weight",
        "heads.exit_02.mlp.linear_fc2.weight": "layers.2.mlp.linear_fc2.weight",
        "heads.exit_03.norm.weight": "heads.final.norm.weight",
        "heads.exit_03.output.weight": "embedding.tokens.weight",
    }
    blocks = [name for name in parameter_shapes(after) if name.startswith("heads.exit_03.block.")]
    sources |= {name: name.replace("heads.exit_03.block.", "layers.4.") for name in blocks}
    expected = {name: tensors[sources.get(name, name)].read() for name in parameter_shapes(after)}
    check(edited_tensors(tensors, before, after, {}, NEW_SEED), expected)


def test_new_exits_have_the_backbones_type() -> None:
    before, after = spec(), spec(ExitSpec(2, "mlp"), init="random")
    tensors = {name: LazyTensor.of(tensor.read().bfloat16()) for name, tensor in numbers(before).items()}
    edited = edited_tensors(tensors, before, after, {}, NEW_SEED)
    assert {tensor.read().dtype for tensor in edited.values()} == {tensor.dtype for tensor in edited.values()} == {torch.bfloat16}


def test_a_checkpoint_of_another_model_is_refused() -> None:
    before, after = spec(*OLD), spec(OLD[0])
    tensors = numbers(before)
    del tensors["heads.exit_01.norm.weight"]
    tensors["layers.9.mlp.weight"] = LazyTensor.of(torch.zeros(1))
    with pytest.raises(ConversionError) as refused:
        edited_tensors(tensors, before, after, {}, NEW_SEED)
    assert "heads.exit_01.norm.weight is missing" in str(refused.value)
    assert "layers.9.mlp.weight is in the source and nothing of the model" in str(refused.value)


KEPT = [ExitSpec(1, "mlp", tie_output=False), ExitSpec(3)]


@pytest.mark.parametrize(
    ("before", "after", "moves", "init", "reasons"),
    [
        (KEPT, KEPT, {}, "random", []),
        (KEPT, [ExitSpec(2, "mlp", tie_output=False), ExitSpec(3)], {1: 2}, "random", []),
        ([ExitSpec(1, "embedding"), ExitSpec(2)], [ExitSpec(1, "block"), ExitSpec(2, "mlp")], {}, "random", []),
        (KEPT, KEPT[1:], {5: 3}, "copy", ["no exit after layer 5", "would lose its weights"]),
        (KEPT, KEPT, {1: 2}, "copy", ["exits.layers=[1, 3] has none there"]),
        (
            KEPT,
            KEPT,
            {1: 3},
            "copy",
            ["exit after layer 3 would lose its weights", "exit_01 has head=mlp", "exit_01 has an output"],
        ),
        (KEPT, [ExitSpec(2, "mlp", False)], {1: 2, 3: 2}, "copy", ["two exits", "two exits"]),
        (
            KEPT,
            [ExitSpec(1), ExitSpec(3)],
            {},
            "copy",
            ["its mlp would be lost", "output matrix of its own, which would be lost"],
        ),
        ([ExitSpec(3)], [ExitSpec(3, "embedding")], {}, "copy", ["its norm would be lost"]),
        ([ExitSpec(3)], [ExitSpec(3, tie_output=False)], {}, "copy", []),
        ([ExitSpec(3)], [ExitSpec(3, tie_output=False)], {}, "random", ["would get a random one"]),
    ],
)
def test_weights_that_would_be_lost(before: list, after: list, moves: dict, init: str, reasons: list[str]) -> None:
    found = [problem.reason for problem in edit_problems(before, after, moves, init)]
    assert len(found) == len(reasons), found
    assert all(reason in said for reason, said in zip(reasons, found, strict=True)), found


def stages(model: ModelSpec, layout: ParallelLayout, seed: int) -> list[Stage]:
    plan = plan_stages(model, layout)
    groups = init_groups(layout, torch.device("cpu"), tied_stages(model, plan))
    return build_stages(model, plan, groups, transformer_config(model, layout, "fp32"), seed)


def save(rank: int, model: ModelSpec, target: str) -> None:
    CheckpointWriter().save(Path(target), model_state(stages(model, ParallelLayout(tp=2), SEED)))


def loaded(rank: int, model: ModelSpec, layout: dict, source: str) -> dict:
    """Name -> this rank's part, as arrays."""
    own = stages(model, ParallelLayout(**layout), SEED + 7)
    load_stages(Path(source), own)
    return {stage.global_name(name): part.detach().numpy() for stage in own for name, part in stage.named_parameters()}


def initial(rank: int, model: ModelSpec, layout: dict, seed: int) -> dict:
    own = stages(model, ParallelLayout(**layout), seed)
    return {stage.global_name(name): part.detach().numpy() for stage in own for name, part in stage.named_parameters()}


@pytest.mark.dist
def test_every_layout_loads_what_was_edited(tmp_path: Path) -> None:
    """On every rank the old exit has what it had, and the new one what training with its seed begins with."""
    before, after = spec(OLD[1], init="random"), spec(ExitSpec(1, "mlp", tie_output=False), OLD[1], init="random")
    workers.run(2, save, before, str(tmp_path / "before"))
    edited = edited_tensors(read_checkpoint(tmp_path / "before"), before, after, {}, NEW_SEED)
    write_checkpoint(tmp_path / "after", edited)
    for layout in ({}, {"tp": 2}, {"pp": 2}):
        world = layout.get("tp", 1) * layout.get("pp", 1)
        got = workers.run(world, loaded, after, layout, str(tmp_path / "after"))
        old = workers.run(world, initial, before, layout, SEED)
        new = workers.run(world, initial, after, layout, NEW_SEED)
        for rank in range(world):
            assert set(got[rank]) == set(new[rank])
            wanted = {name: (new if name.startswith("heads.exit_01") else old)[rank][name] for name in got[rank]}
            assert [name for name, part in got[rank].items() if not (part == wanted[name]).all()] == [], (layout, rank)


def decode(rank: int, model: ModelSpec, job: models.Job, source: str) -> models.Outcome:
    own = stages(model, ParallelLayout(), SEED + 7)
    load_stages(Path(source), own)
    return models.decode_with(own[0].eval().requires_grad_(False), job)


@pytest.mark.dist
@pytest.mark.parametrize("moves", [{1: 4}, {2: 3, 3: 2}])
def test_a_moved_exit_is_the_same_head_behind_another_layer(moves: dict[int, int], tmp_path: Path) -> None:
    before = spec(*OLD)
    after = replace(before, exits=tuple(moved(OLD, moves)))
    workers.run(2, save, before, str(tmp_path / "before"))
    tensors = read_checkpoint(tmp_path / "before")
    write_checkpoint(tmp_path / "after", edited_tensors(tensors, before, after, moves, NEW_SEED))
    by_hand = {name: tensor.read().numpy() for name, tensor in tensors.items()}
    for old, new in moves.items():
        own = {name: tensor.read().numpy() for name, tensor in tensors.items() if name.startswith(f"heads.exit_{old:02d}.")}
        by_hand |= {name.replace(f"exit_{old:02d}", f"exit_{new:02d}"): value for name, value in own.items()}
    for layer in moves.values():
        rule = oracle.Rule("fixed_layer", {layer: 0.0})
        job = models.Job(after, models.policy(after, "fixed_layer", 0.0, (layer,)), Request(12))
        (outcome,) = workers.run(1, decode, after, job, str(tmp_path / "after"))
        expected = oracle.decode(after, by_hand, models.PROMPT, 12, rule)
        assert [(token.id, token.head) for token in outcome.tokens] == [(token.id, token.head) for token in expected]
        assert [token.confidence for token in outcome.tokens] == pytest.approx([token.confidence for token in expected], abs=2e-5)
