"""Traps of megatron-core and of exits within its schedules, one named test each: all of them give wrong numbers without an error.

Elsewhere: optimizer states in checkpoints and data after a resume (tests/train), the whole product of layouts (test_parity).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from eellm.data.batch import GlobalBatch
from eellm.engine.megatron import MegatronEngine
from eellm.layout import ParallelLayout
from eellm.mcore import checkpoint
from eellm.mcore.checkpoint_writer import CheckpointWriter
from eellm.mcore.data_parallel import ReductionOptions
from eellm.mcore.parts import transformer_config
from eellm.model.initialise import initialise
from eellm.model.objective import LossSums, Objective, ObjectiveOptions
from eellm.model.spec import ExitSpec, plan_stages
from eellm.model.stage import Stage
from tests import workers
from tests.conftest import ROOT
from tests.engine.layouts import GLOBAL_BATCH, Case, build, global_batch, one_step, optimizer_of, tiny_spec
from tests.engine.matrix import TOLERANCE, compare, relative
from tests.reference import Reference

DEFERRED = pytest.mark.parametrize("deferred", [True, False], ids=["deferred", "eager"])
ALL_HEADS = (ExitSpec(1, "embedding"), ExitSpec(2, "mlp", tie_output=False), ExitSpec(3, "block"), ExitSpec(4, "norm"))
SHARDED = tiny_spec(exits=ALL_HEADS, norm="layernorm", position="learned", qk_norm="projection", linear_bias=True, qkv_bias=True)
ON_STAGES_1_AND_2 = tiny_spec(num_layers=8, exits=(ExitSpec(4), ExitSpec(5, "mlp")))


def objective_of(case: Case, index: int) -> Objective:
    return Objective(global_batch(case)[index], case.weights, case.options, LossSums(), lambda: 1.0)


def gradients_of_two(rank: int, case: Case, together: bool) -> list[np.ndarray]:
    """Two microbatches, in flight together (both forward, then both backward) or one after the other."""
    chunks = build(case, rank)
    batch, chunk = global_batch(case), chunks.wrapped[0]
    chunks.zero_grad()
    for indices in [(0, 1)] if together else [(0,), (1,)]:
        losses = [chunk(batch[index], objective_of(case, index)) for index in indices]
        for loss in losses:
            loss.backward()
    return [parameter.main_grad.numpy().copy() for parameter in chunks.stages[0].parameters()]


@DEFERRED
def test_labels_and_mask_belong_to_their_microbatch(deferred: bool) -> None:
    """By backward time the stage has seen other microbatches; with recomputation a hook that asks it for labels gets theirs."""
    case = Case(tiny_spec(), options=ObjectiveOptions(deferred), recompute="full", unmasked=31)
    (together,), (alone,) = (workers.run(1, gradients_of_two, case, value) for value in (True, False))
    for actual, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(actual, expected)


@DEFERRED
def test_loss_scale_reaches_the_exits(deferred: bool) -> None:
    """A scale that is a power of two only shifts exponents in fp32: exits that miss it would have 1/1024 of their gradient."""
    case = Case(tiny_spec(exits=ALL_HEADS), {"pp": 2}, options=ObjectiveOptions(deferred))
    plain, scaled = (workers.run(2, scaled_gradients, case, scale) for scale in (1.0, 1024.0))
    for actual, expected in zip(scaled, plain, strict=True):
        assert actual.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(actual[name], 1024 * expected[name], rtol=1e-6, err_msg=name)


def scaled_gradients(rank: int, case: Case, scale: float) -> dict[str, np.ndarray]:
    chunks = build(case, rank)
    chunks.config.grad_scale_func = lambda loss: loss * scale
    engine = MegatronEngine(chunks, case.options)
    engine.grad_scale = lambda: scale
    chunks.zero_grad()
    engine.run(global_batch(case), case.weights)
    return {name: p.main_grad.numpy().copy() for stage in chunks.stages for name, p in stage.named_parameters()}


def test_loss_is_a_mean_over_tokens_not_over_microbatches() -> None:
    case = Case(tiny_spec(), {"dp": 2}, unmasked=31)
    results = workers.run(2, one_step, case)
    parameters = {piece.name: torch.from_numpy(piece.parameter).double() for piece in results[0]["pieces"]}
    batch, oracle = global_batch(case), Reference(case.spec, parameters)
    _, by_token = oracle.losses(batch, case.weights)
    microbatches = [
        GlobalBatch(*(part[index : index + 1] for part in (batch.tokens, batch.labels, batch.loss_mask, batch.positions)))
        for index in range(len(batch))
    ]
    singles = [oracle.losses(microbatch, case.weights)[1]["final"] for microbatch in microbatches]
    by_microbatch = torch.stack(singles).nanmean()
    assert relative(by_microbatch, by_token["final"]) > 100 * TOLERANCE["fp32"], "the data cannot tell them apart"
    assert relative(results[0]["losses"].means["final"], by_token["final"]) < TOLERANCE["fp32"]
    assert compare(case).gradient < TOLERANCE["fp32"]


@DEFERRED
def test_a_stage_that_ends_in_an_exit_returns_no_view(deferred: bool) -> None:
    """The schedule frees the memory of what a stage returned once it is sent, which it refuses for a view."""
    ((is_view, has_graph),) = workers.run(1, output_of_first_stage, Case(tiny_spec(), options=ObjectiveOptions(deferred)))
    assert not is_view
    assert has_graph


def output_of_first_stage(rank: int, case: Case) -> tuple[bool, bool]:
    groups = build(case, rank).groups
    (first, _) = plan_stages(case.spec, ParallelLayout(pp=2))
    assert first.segments[-1].exit is not None
    stage = Stage(case.spec, first, transformer_config(case.spec, case.parallel), [0], groups.tp)
    initialise(stage, 1, 0)
    output = stage(global_batch(case)[0], objective_of(case, 0))
    return output._is_view(), output.grad_fn is not None


@pytest.mark.parametrize(("recompute", "layers", "kernels"), [("none", 1, 1), ("selective", 1, 2), ("full", 2, 2)])
def test_recomputation_covers_stages_with_exits(recompute: str, layers: int, kernels: int) -> None:
    """Right numbers do not show that it takes place: passes are counted, on a stage that ends in an exit and on the last."""
    case = Case(tiny_spec(exits=(ExitSpec(2),)), {"pp": 2}, recompute=recompute)
    for counted in workers.run(2, count_passes, case):
        assert counted == (2 * GLOBAL_BATCH * layers, 2 * GLOBAL_BATCH * kernels)


def count_passes(rank: int, case: Case) -> tuple[int, int]:
    """(passes through decoder layers, calls of attention kernels) of one training step on this rank."""
    chunks = build(case, rank)
    (stage,) = chunks.stages
    counts = [0, 0]

    def counting(function: Callable, which: int) -> Callable:
        def counted(*args: object) -> object:
            counts[which] += 1
            return function(*args)

        return counted

    for layer in stage.layers.children():
        layer.forward = counting(layer.forward, 0)
        layer.attention.kernel = counting(layer.attention.kernel, 1)
    MegatronEngine(chunks, case.options).run(global_batch(case), case.weights)
    return counts[0], counts[1]


@pytest.mark.parametrize(("world", "layout"), [(2, {"pp": 2, "vp": 2}), (4, {"pp": 4, "vp": 2})], ids=["pp2_vp2", "pp4_vp2"])
def test_interleaved_messages_meet_their_receivers(world: int, layout: dict) -> None:
    """With batched messages gloo pairs those of two neighbours that are the same rank wrongly."""
    spec = tiny_spec(num_layers=8, exits=(ExitSpec(2), ExitSpec(5, "mlp"), ExitSpec(8)))
    case = Case(spec, layout)
    assert transformer_config(spec, case.parallel, on_cpu=True).batch_p2p_comm is False
    assert case.parallel.world_size == world
    found = compare(case)
    assert max(found.gradient, found.loss, found.norm) < TOLERANCE["fp32"], found


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_checkpoint_gives_each_tensor_parallel_rank_its_own_part(sequence_parallel: bool, tmp_path: Path) -> None:
    """TP2 -> TP2. Below a plain Module parts are saved as if replicated, and rank 1 gets rank 0's without an error."""
    path = tmp_path / "checkpoint"
    case = Case(SHARDED, {"tp": 2, "sequence_parallel": sequence_parallel})
    for plain, lost in workers.run(2, save_and_load, case, path):
        assert plain == [], "sharded parameters below modules that megatron-core saves as replicated"
        assert lost == []


def save_and_load(rank: int, case: Case, path: Path) -> tuple[list[str], list[str]]:
    """(modules that hide sharded parameters from megatron-core, parameters that did not come back)."""
    (stage,) = build(case, rank).stages
    for name, parameter in stage.named_parameters():  # nothing left at its initial value, nothing equal on both ranks if sharded
        torch.manual_seed(len(name) + (rank + 1) * 100 * getattr(parameter, "tensor_model_parallel", False))
        parameter.data.normal_()
    kept = {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}
    CheckpointWriter().save(path, checkpoint.model_state([stage]))
    for parameter in stage.parameters():
        parameter.data.zero_()
    checkpoint.load_stages(path, [stage])
    lost = [name for name, parameter in stage.named_parameters() if not torch.equal(parameter, kept[name])]
    return plain_parents(stage), lost


def plain_parents(stage: Stage) -> list[str]:
    sharded = [name for name, parameter in stage.named_parameters() if getattr(parameter, "tensor_model_parallel", False)]
    assert len(sharded) > 20
    parents = {".".join(name.split(".")[:depth]) for name in sharded for depth in range(name.count(".") + 1)}
    modules = dict(stage.named_modules())
    return [name for name in sorted(parents) if not hasattr(modules[name], "sharded_state_dict")]


def test_norms_are_marked_for_sequence_parallel_reduction() -> None:
    """Each rank's norms see a part of the sequence; mcore sums only gradients of marked parameters."""
    for sequence_parallel in (True, False):
        case = Case(SHARDED, {"tp": 2, "sequence_parallel": sequence_parallel})
        for marks in workers.run(2, norm_marks, case):
            assert {"heads.exit_02.mlp_norm.bias", "heads.exit_03.block.mlp_norm.weight", "heads.final.norm.bias"} <= marks.keys()
            assert set(marks.values()) == {sequence_parallel}


def norm_marks(rank: int, case: Case) -> dict[str, bool]:
    (stage,) = build(case, rank).stages
    norms = {
        name: p for name, p in stage.named_parameters() if "norm." in name and ".q_norm" not in name and ".k_norm" not in name
    }
    return {name: bool(getattr(parameter, "sequence_parallel", False)) for name, parameter in norms.items()}


TIED = {
    "pp2_dp2_distributed": Case(
        tiny_spec(exits=(ExitSpec(1), ExitSpec(3))), {"pp": 2, "dp": 2}, reduction=ReductionOptions(True, True, True)
    ),
    "pp2_vp2": Case(tiny_spec(num_layers=8, exits=(ExitSpec(3), ExitSpec(6))), {"pp": 2, "vp": 2}),
    "pp4_exits_on_stages_1_and_2": Case(ON_STAGES_1_AND_2, {"pp": 4}),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_copies_stay_one_matrix(name: str) -> None:
    """Gradients are those of one matrix, the norm counts it once, and 20 steps leave all copies bit-equal."""
    case = TIED[name]
    found = compare(case)
    assert max(found.gradient, found.loss, found.norm) < TOLERANCE["fp32"], found
    copies = [copy for rank in workers.run(case.parallel.world_size, train_copies, case, 20) for copy in rank]
    assert len(copies) == 4
    initial = workers.run(case.parallel.world_size, train_copies, case, 0)[0][0]
    assert np.abs(copies[0] - initial).max() > 1e-3
    for copy in copies[1:]:
        np.testing.assert_array_equal(copy, copies[0])


def train_copies(rank: int, case: Case, steps: int) -> list[np.ndarray]:
    """This rank's copies of the tied matrix after some steps."""
    chunks = build(case, rank)
    optimizer = optimizer_of(case, chunks)
    engine = MegatronEngine(chunks, case.options)
    batch = global_batch(case, chunks.groups.dp_rank, case.parallel.dp)
    for _ in range(steps):
        chunks.zero_grad()
        optimizer.zero_grad()
        engine.run(batch, case.weights)
        assert optimizer.step().outcome == "applied"
    chunks.synchronise_parameters()
    weights = [stage.tied_weight() for stage in chunks.stages]
    return [weight.detach().numpy().copy() for weight in weights if weight is not None]


def test_the_checkpoint_writers_silent_need_is_installed() -> None:
    """mcore's writer waits for ever without psutil, which it does not ask for itself."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert any(requirement.startswith("psutil") for requirement in requirements)
