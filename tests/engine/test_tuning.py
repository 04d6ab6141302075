"""Tuning exits equals one-process autograd on their parameters, on every layout; the backbone stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eellm.engine.distillation import Distillation
from eellm.mcore.data_parallel import ReductionOptions
from eellm.model.spec import ExitSpec
from tests import workers
from tests.engine.layouts import MICRO, SEQUENCE, Case, assemble, global_batch, tiny_spec
from tests.engine.matrix import relative
from tests.engine.tuning import only, peaks_of_distilling, steps_from_kept_states, tuned, tuning_steps
from tests.reference import Reference

HEADS = (ExitSpec(1, "embedding", False), ExitSpec(2, "mlp", temperature=1.5), ExitSpec(3, "block"), ExitSpec(4, "norm", False))
deep = tiny_spec(num_layers=6, exits=HEADS)
lonely = tiny_spec(num_layers=8, exits=(ExitSpec(4, "mlp"),))
distributed = ReductionOptions(distributed_optimizer=True)

CASES = {
    "pp1": Case(tuned(deep)),
    "pp1_untied_input": Case(tuned(replace(deep, tie_embeddings=False))),
    "pp1_token_confidence": Case(tuned(deep), token_confidence=True, unmasked=31),
    "pp1_documents": Case(tuned(deep), documents=True),
    "pp1_whole": Case(tuned(deep, whole=True)),
    "pp2": Case(tuned(deep), {"pp": 2}),
    "pp2_boundary_start": Case(tuned(deep), {"pp": 2}, boundary="start"),
    "pp2_whole": Case(tuned(deep, whole=True), {"pp": 2}),
    "tp2": Case(tuned(deep), {"tp": 2}),
    "tp2_sp": Case(tuned(deep), {"tp": 2, "sequence_parallel": True}),
    "pp2_vp2": Case(tuned(deep), {"pp": 2, "vp": 2}),
    "dp2": Case(tuned(deep), {"dp": 2}, unmasked=31),
    "dp2_distributed": Case(tuned(deep), {"dp": 2}, reduction=distributed),
    "pp3_uneven": Case(tuned(deep), {"pp": 3}, layers_per_stage=(1, 2, 1)),
    "tp2_pp2": Case(tuned(deep), {"tp": 2, "pp": 2, "sequence_parallel": True}),
    # stages without anything to train: the first, the last, chunks in between
    "pp2_exit_on_the_last_stage": Case(tuned(lonely), {"pp": 2}),
    "pp2_exit_on_the_first_stage": Case(tuned(lonely, whole=True), {"pp": 2}),
    "pp2_vp2_one_exit": Case(tuned(lonely), {"pp": 2, "vp": 2}),
    "pp2_dp2_distributed_one_exit": Case(tuned(lonely), {"pp": 2, "dp": 2}, reduction=distributed),
    "pp2_bf16": Case(tuned(deep), {"pp": 2}, dtype="bf16"),
    "pp2_fp16_distributed_one_exit": Case(tuned(lonely), {"pp": 2}, dtype="fp16", reduction=distributed),
}
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 8e-3}


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd(name: str) -> None:
    case = CASES[name]
    tolerance = TOLERANCE[case.dtype]
    results = workers.run(case.parallel.world_size, tuning_steps, case)
    parameters = {key: copies[0].double() for key, copies in assemble(results, "parameter").items()}
    exits = {key: tensor.requires_grad_() for key, tensor in parameters.items() if key.startswith("heads.exit_")}
    objective, means = Reference(case.spec, parameters).losses(global_batch(case), case.weights)
    objective.backward()
    for result in results:
        for losses in (result["losses"], result["validation"]):
            assert losses.num_tokens == global_batch(case).loss_mask.sum()
            assert set(losses.means) == set(case.spec.heads)
        assert all(relative(result["losses"].means[head], means[head]) < tolerance for head in case.spec.heads)
    gradients = assemble(results, "gradient")
    assert set(gradients) == set(exits), "only exits have gradients"
    for key, copies in gradients.items():
        assert all(relative(copy, exits[key].grad) < tolerance for copy in copies), key
    norm = torch.stack([tensor.grad.norm() for tensor in exits.values()]).norm()
    assert all(relative(result["grad_norm"], norm) < tolerance for result in results)


KEPT = {
    "pp1": Case(tuned(deep), documents=True),
    "pp2_dp2": Case(tuned(lonely), {"pp": 2, "dp": 2}),
    "tp2_sp": Case(tuned(deep), {"tp": 2, "sequence_parallel": True}),
}


@pytest.mark.dist
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", KEPT)
def test_tuning_from_kept_hidden_states(name: str, dtype: str, tmp_path: Path) -> None:
    """To the bit where they are kept as they are; else within bf16's rounding, and never through the layers again."""
    case = KEPT[name]
    results = workers.run(case.parallel.world_size, steps_from_kept_states, case, str(tmp_path), dtype)
    passing, kept = (assemble(results, "gradient", which) for which in ("passing", "kept"))
    for key, copies in passing.items():
        for one, other in zip(copies, kept[key], strict=True):
            assert torch.equal(one, other) if dtype == "fp32" else 0 < relative(other, one) < 2e-2, key
    for result in results:
        assert result["kept_losses"] == pytest.approx(result["passing_losses"], rel=1e-7 if dtype == "fp32" else 1e-2)


apart = replace(deep, exits=(ExitSpec(1, "norm", False), ExitSpec(3, "mlp", False)), tie_embeddings=False)
"""No exit uses the model's output matrix, and no stage but the last would hold it."""
DISTILLED = {
    "single": Case(tuned(deep, whole=True), unmasked=31),
    "tp2_sequence_parallel": Case(tuned(deep, whole=True), {"tp": 2, "sequence_parallel": True}, unmasked=31),
    "dp2": Case(tuned(deep, whole=True), {"dp": 2}, unmasked=31),
    "pp2": Case(tuned(deep, whole=True), {"pp": 2}, unmasked=31),
    "pp2_vp2": Case(tuned(deep, whole=True), {"pp": 2, "vp": 2}, unmasked=31),
    "pp3_own_matrices": Case(tuned(apart, whole=True), {"pp": 3}, unmasked=31),
    "tp2_pp2": Case(tuned(deep, whole=True), {"tp": 2, "pp": 2, "sequence_parallel": True}, unmasked=31),
    "pp2_dp2_distributed_one_exit": Case(tuned(lonely, whole=True), {"pp": 2, "dp": 2}, reduction=distributed),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", DISTILLED)
def test_distillation_is_plain_divergence(name: str) -> None:
    """Gradients of (1 - share) cross-entropy + share T^2 KL(final || exit), both at the temperatures they should have."""
    case = DISTILLED[name]
    share, temperature, batch = 0.7, 2.0, global_batch(case)
    results = workers.run(case.parallel.world_size, tuning_steps, case, 1, None, Distillation(share, temperature))
    parameters = {key: copies[0].double() for key, copies in assemble(results, "parameter").items()}
    exits = {key: tensor.requires_grad_() for key, tensor in parameters.items() if key.startswith("heads.exit_")}
    reference = Reference(case.spec, parameters)
    objective, means = reference.losses(batch, case.weights)
    divergence = 0.0
    for microbatch in (batch[index] for index in range(len(batch))):
        logits = reference.logits(microbatch)
        teacher = (logits.pop("final") / temperature).log_softmax(-1)
        for head, student in logits.items():
            kl = (teacher.exp() * (teacher - (student / temperature).log_softmax(-1))).sum(-1)
            divergence = divergence + case.weights.values[head] * temperature**2 * (kl * microbatch.loss_mask).sum()
    ((1 - share) * objective + share * divergence / batch.loss_mask.sum()).backward()
    for key, copies in assemble(results, "gradient").items():
        assert all(relative(copy, exits[key].grad) < 1e-5 for copy in copies), key
    assert all(relative(result["losses"].means[head], means[head]) < 1e-5 for result in results for head in means)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["pp2", "pp2_vp2"])
def test_what_waits_for_the_final_head_does_not_grow_with_the_microbatches(name: str) -> None:
    hidden = SEQUENCE * MICRO * deep.hidden_size * 4
    for half, whole in workers.run(2, peaks_of_distilling, DISTILLED[name]):
        assert whole < half + hidden, "four more microbatches, of which two exits a stage would wait"


@pytest.mark.dist
@pytest.mark.parametrize("name", ["pp1", "tp2_sp", "pp2_vp2_one_exit", "pp2_dp2_distributed_one_exit", "pp2_bf16"])
def test_steps_change_exits_and_nothing_else(name: str) -> None:
    case = CASES[name]
    results = workers.run(case.parallel.world_size, tuning_steps, case, 3)
    before, after = (assemble(results, "parameter", when) for when in ("before", "after"))
    for key, copies in after.items():
        frozen = not key.startswith("heads.exit_")
        assert all(torch.equal(old, new) == frozen for old, new in zip(before[key], copies, strict=True)), key
    exits = sum(copies[0].numel() for key, copies in after.items() if key.startswith("heads.exit_"))
    held = sum(result["held"] for result in results)
    assert held >= exits, "the optimizer holds the exits"
    if case.parallel.tp == case.parallel.dp == 1:
        assert held == exits, "and nothing else"


@pytest.mark.dist
def test_nothing_above_the_deepest_exit_is_built() -> None:
    results = workers.run(2, tuning_steps, CASES["pp2_exit_on_the_last_stage"])
    assert [result["layers"] for result in results] == [["1", "2"], ["3", "4"]]
    assert not any(piece.name.startswith(("heads.final", "layers.5")) for result in results for piece in result["pieces"])


@pytest.mark.dist
@pytest.mark.parametrize("name", ["pp1", "pp2_bf16", "dp2_distributed"])
def test_exits_tuned_together_become_what_they_become_alone(name: str) -> None:
    """Bit for bit, where some gradients are clipped and others are not."""
    case, world = CASES[name], CASES[name].parallel.world_size
    together = assemble(workers.run(world, tuning_steps, case, 3), "parameter", "after")
    for exit_ in case.spec.exits:
        if exit_.layer < case.parallel.num_stages:
            continue  # fewer layers than stages
        alone = assemble(workers.run(world, tuning_steps, only(case, exit_.layer), 3, case.weights), "parameter", "after")
        keys = [key for key in alone if key.startswith(f"heads.{exit_.name}.")]
        assert keys
        for key in keys:
            assert torch.equal(together[key][0], alone[key][0]), key
