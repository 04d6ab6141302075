"""The executor of programs: gradients of one-process autograd under every schedule, and under bubble filling the stated means."""

from __future__ import annotations

import pytest

from eellm.mcore.data_parallel import ReductionOptions
from eellm.model.spec import ExitSpec
from tests.engine.layouts import Case, tiny_spec
from tests.engine.matrix import TOLERANCE, compare

HEADS = (ExitSpec(1, "embedding"), ExitSpec(2, "mlp", tie_output=False, temperature=1.5), ExitSpec(3, "block"), ExitSpec(4))
MODEL = tiny_spec(exits=HEADS)
EIGHT = tiny_spec(num_layers=8, exits=(ExitSpec(2), ExitSpec(3, "mlp"), ExitSpec(6, "block", tie_output=False)), tie_embeddings=False)
OVERLAP, DISTRIBUTED = ReductionOptions(overlap_grad_reduce=True), ReductionOptions(True, True, True)
CASES = {
    "pp1": Case(MODEL, schedule="one_f_one_b"),
    "pp2": Case(MODEL, {"pp": 2}, schedule="one_f_one_b"),
    "pp2_start_masked": Case(MODEL, {"pp": 2}, boundary="start", unmasked=5, schedule="one_f_one_b"),
    "pp4_uneven": Case(EIGHT, {"pp": 4}, layers_per_stage=(3, 2, 2, 1), schedule="one_f_one_b"),
    "pp4_gpipe": Case(EIGHT, {"pp": 4}, schedule="gpipe"),
    "pp2_vp2": Case(MODEL, {"pp": 2, "vp": 2}, schedule="interleaved"),
    "pp4_vp2_eager": Case(EIGHT, {"pp": 4, "vp": 2}, schedule="interleaved"),
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
