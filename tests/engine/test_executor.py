"""The executor of programs: gradients of one-process autograd under every schedule, and under bubble filling the stated means."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from eellm.benchmark.live_memory import peak_bytes
from eellm.engine.executor import ProgramEngine
from eellm.engine.schedules import schedule_of
from eellm.mcore.data_parallel import ReductionOptions
from eellm.model.objective import HeadWeights, ObjectiveOptions
from eellm.model.spec import ExitSpec, StageSpec, plan_stages
from eellm.schedule.bubble_filling import Filling, fill
from tests import workers
from tests.engine.layouts import (
    GLOBAL_BATCH,
    MICRO,
    SEQUENCE,
    Case,
    assemble,
    build,
    global_batch,
    one_step,
    schedule_config,
    tiny_spec,
)
from tests.engine.matrix import TOLERANCE, compare, relative
from tests.reference import Reference

HEADS = (ExitSpec(1, "embedding"), ExitSpec(2, "mlp", tie_output=False, temperature=1.5), ExitSpec(3, "block"), ExitSpec(4))
MODEL = tiny_spec(exits=HEADS)
EIGHT = tiny_spec(
    num_layers=8, exits=(ExitSpec(2), ExitSpec(3, "mlp"), ExitSpec(6, "block", tie_output=False)), tie_embeddings=False
)
OVERLAP, DISTRIBUTED = ReductionOptions(overlap_grad_reduce=True), ReductionOptions(True, True, True)
CASES = {
    "pp1": Case(MODEL, schedule="one_f_one_b"),
    "pp2": Case(MODEL, {"pp": 2}, schedule="one_f_one_b"),
    "pp2_start_masked": Case(MODEL, {"pp": 2}, boundary="start", unmasked=5, schedule="one_f_one_b"),
    "pp4_uneven": Case(EIGHT, {"pp": 4}, layers_per_stage=(3, 2, 2, 1), schedule="one_f_one_b"),
    "pp4_gpipe": Case(EIGHT, {"pp": 4}, schedule="gpipe"),
    "pp2_vp2": Case(MODEL, {"pp": 2, "vp": 2}, schedule="interleaved"),
    "pp4_vp2_eager": Case(EIGHT, {"pp": 4, "vp": 2}, options=ObjectiveOptions(False, chunk=11), schedule="interleaved"),
    "pp2_tp2_sp": Case(MODEL, {"pp": 2, "tp": 2, "sequence_parallel": True}, schedule="one_f_one_b"),
    "pp2_dp2_overlap": Case(MODEL, {"pp": 2, "dp": 2}, reduction=OVERLAP, unmasked=31, schedule="one_f_one_b"),
    "pp2_dp2_distributed": Case(MODEL, {"pp": 2, "dp": 2}, reduction=DISTRIBUTED, schedule="one_f_one_b"),
    "pp2_recompute": Case(MODEL, {"pp": 2}, recompute="full", schedule="one_f_one_b"),
    "pp2_bf16": Case(MODEL, {"pp": 2}, dtype="bf16", schedule="one_f_one_b"),
    "pp2_fp16": Case(MODEL, {"pp": 2}, dtype="fp16", schedule="one_f_one_b"),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_whole_microbatches_give_the_gradient_of_one_process(name: str) -> None:
    found, tolerance = compare(CASES[name]), TOLERANCE[CASES[name].dtype]
    assert found.gradient < tolerance, found.parameter
    assert found.loss < tolerance
    assert found.norm < tolerance


def peaks(rank: int, case: Case) -> list[int]:
    """Bytes that a step makes and holds at most, with most of the microbatches and with all; the pipeline is full in both."""
    chunks, batch, found = build(case, rank), global_batch(case), []
    for size in (GLOBAL_BATCH * 3 // 4, GLOBAL_BATCH):
        layout = replace(case.parallel, global_batch_size=size)
        engine = ProgramEngine(chunks, case.options, schedule_of(schedule_config(case), layout, chunks.plan))
        part = type(batch)(*(None if value is None else value[: layout.num_microbatches] for value in vars(batch).values()))
        chunks.zero_grad()
        engine.run(part, case.weights)
        found.append(peak_bytes(partial(engine.run, part, case.weights)))
    return found


@pytest.mark.dist
def test_messages_on_their_way_do_not_grow_with_the_microbatches() -> None:
    case = CASES["pp2"]
    for most, whole in workers.run(2, peaks, case):
        assert whole < most + SEQUENCE * MICRO * case.spec.hidden_size * 4


def filled(exits: tuple[int, ...], layout: dict, **changes) -> Case:
    heads = tuple(ExitSpec(layer, "mlp" if layer % 2 else "norm", tie_output=layer != 3) for layer in exits)
    layers = 2 * layout["pp"]
    return Case(tiny_spec(num_layers=layers, exits=heads, tie_embeddings=False), layout, schedule="bubble_filling", **changes)


FILLED = {
    "pp4, an exit on every stage": filled((2, 4, 6, 7), {"pp": 4}),
    "pp4, on the first": filled((1,), {"pp": 4}),
    "pp4, on the second, some tokens": filled((3,), {"pp": 4}, unmasked=31),
    "pp4, on the third": filled((6,), {"pp": 4}),
    "pp4, at the start of a stage": filled((2, 4), {"pp": 4}, boundary="start"),
    "pp4, none": filled((), {"pp": 4}),
    "pp4, part 1": filled((2, 4), {"pp": 4}, fill=(2, 0)),
    "pp4, part 2": filled((2, 4), {"pp": 4}, fill=(0, 2)),
    "pp4, one each": filled((2, 4), {"pp": 4}, fill=(1, 1)),
    "pp3 x tp2": filled((2, 3), {"pp": 3, "tp": 2}),
    "pp3 x dp2, some tokens": filled((2, 3), {"pp": 3, "dp": 2}, unmasked=40, reduction=OVERLAP),
    "pp3, fp16": filled((2, 3), {"pp": 3}, dtype="fp16"),
}


def filling_of(case: Case, plan: list[StageSpec]) -> Filling:
    exits = {stage.index for stage in plan if stage.exits}
    return fill(case.parallel.pp, case.parallel.num_microbatches, exits, 2.0, *case.fill)


def stage_of(name: str, plan: list[StageSpec]) -> int:
    """Of a parameter."""
    first = name.split(".")[0]
    if first == "layers":
        return next(stage.index for stage in plan if int(name.split(".")[1]) in stage.layers)
    if first == "heads" and not name.startswith("heads.final"):
        return next(stage.index for stage in plan if any(exit_.name == name.split(".")[1] for exit_ in stage.exits))
    return 0 if first == "embedding" else len(plan) - 1


def coefficient(filling: Filling, tokens: list[float], source: int, stage: int, microbatch: int, is_final: bool) -> float:
    """What a token of a microbatch counts for in the gradient of a loss on stage `source` at a parameter of `stage`: 1 / (N + n)
    in part 1, N / ((N + n) (N + c)) of an exit elsewhere, 1 / (N + c) of the final head; 0 where it does not come."""
    ordinary = sum(tokens[: filling.ordinary])
    first = {filling.part_one[index]: reach for index, reach in enumerate(filling.reach)}
    second = {filling.ordinary + index: begins for index, begins in enumerate(filling.begins)}
    n = sum(tokens[index] for index, reach in first.items() if source < reach)
    c = sum(tokens[index] for index, begins in second.items() if stage >= begins)
    if microbatch in first:
        return 1 / (ordinary + n) if source < first[microbatch] and not is_final else 0.0
    if microbatch in second and stage < second[microbatch]:
        return 0.0
    return 1 / (ordinary + c) if is_final else ordinary / (ordinary + n) / (ordinary + c)


def expected_gradients(case: Case, parameters: dict[str, torch.Tensor], plan: list[StageSpec]) -> dict[str, torch.Tensor]:
    """From one-process gradients of each head's loss on each microbatch, put together with these coefficients."""
    batch, dp, model = global_batch(case), case.parallel.dp, Reference(case.spec, parameters)
    tokens = [float(batch.loss_mask[number * dp : (number + 1) * dp].sum()) for number in range(case.parallel.num_microbatches)]
    filling, found = filling_of(case, plan), {name: torch.zeros_like(value) for name, value in parameters.items()}
    sources = {exit_.name: stage.index for stage in plan for exit_ in stage.exits} | {"final": len(plan) - 1}
    for row in range(len(batch)):
        one = type(batch)(*(None if part is None else part[row : row + 1] for part in vars(batch).values()))
        count = one.loss_mask.sum()
        for head, source in sources.items() if count else ():
            only = HeadWeights({name: case.weights.values[name] * (name == head) for name in case.spec.heads})
            loss = model.losses(one, only)[0] * count
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for (name, total), grad in zip(found.items(), grads, strict=True):
                if grad is not None:
                    stage = source if name == "output.weight" else stage_of(name, plan)
                    total += grad * coefficient(filling, tokens, source, stage, row // dp, head == "final")
    return found


@pytest.mark.dist
@pytest.mark.parametrize("name", FILLED)
def test_bubble_filling_gives_the_means_that_it_states(name: str) -> None:
    case = FILLED[name]
    plan = plan_stages(case.spec, case.parallel, None, case.boundary)
    results = workers.run(case.parallel.world_size, one_step, case)
    parameters = {name: copies[0].double().requires_grad_() for name, copies in assemble(results, "parameter").items()}
    expected = expected_gradients(case, parameters, plan)
    for name, copies in assemble(results, "gradient").items():
        for copy in copies:
            assert relative(copy, expected[name]) < TOLERANCE[case.dtype], name
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm()
    assert all(relative(result["grad_norm"], norm) < TOLERANCE[case.dtype] for result in results)
    assert_losses_are_means_of_what_was_computed(case, parameters, plan, results)


def assert_losses_are_means_of_what_was_computed(
    case: Case, parameters: dict[str, torch.Tensor], plan: list[StageSpec], results: list[dict]
) -> None:
    batch, filling, dp = global_batch(case), filling_of(case, plan), case.parallel.dp
    ordinary, through = filling.ordinary, filling.part_one.start
    for stage in plan:
        late = [ordinary + index for index, begins in enumerate(filling.begins) if stage.index >= begins]
        early = [through + index for index, reach in enumerate(filling.reach) if stage.index < reach]
        for head in [exit_.name for exit_ in stage.exits] + ["final"] * stage.has_final_head:
            numbers = [*range(ordinary), *late, *(early if head != "final" else [])]
            rows = [number * dp + rank for number in numbers for rank in range(dp)]
            part = type(batch)(*(None if value is None else value[rows] for value in vars(batch).values()))
            mean = Reference(case.spec, parameters).losses(part, case.weights)[1][head]
            for result in results:
                assert relative(result["losses"].means[head], mean) < TOLERANCE[case.dtype], head
                assert result["losses"].num_tokens == batch.loss_mask.sum()


@pytest.mark.dist
@pytest.mark.parametrize("exits", [(2, 4), (1, 3, 6), (6,)])
def test_equal_microbatches_give_the_gradient_of_one(exits: tuple[int, ...]) -> None:
    """Whichever part a microbatch is of: the plain oracle of a whole batch."""
    found = compare(filled(exits, {"pp": 4}, identical=True))
    assert found.gradient < TOLERANCE["fp32"], found.parameter
    assert found.norm < TOLERANCE["fp32"]
