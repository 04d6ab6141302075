"""What a tuning step keeps: nothing of the backbone, whatever its depth and however many microbatches there are."""

from __future__ import annotations

import pytest
import torch

from eellm.benchmark.live_memory import peak_bytes
from eellm.benchmark.tuning import build_tuning, memory_figures
from eellm.config.compose import compose
from eellm.mcore.groups import init_groups
from eellm.model.spec import tied_stages
from eellm.tasks.session import Plan
from tests import workers
from tests.benchmark.models import TINY

DEEP = ["model.num_layers=12", "exits.layers=[2,12]", "exits.head=[mlp,norm]", "loss_weights.values=0.5"]
NARROW = ["tokenizer.vocab_size=300", "trainer.loss_chunk=16"]
"""Hidden states and activations are then the largest tensors, not logits."""


def memory(rank: int, *overrides: str) -> dict[str, float]:
    """Peaks of a step and its parts in bytes, and the size of one microbatch's hidden states."""
    config = compose([*TINY, "benchmark=tuning", *DEEP, *NARROW, *overrides])
    plan = Plan.of_tuning(config, config.tokenizer.vocab_size or 0)
    groups = init_groups(plan.layout, torch.device("cpu"), tied_stages(plan.spec, plan.stages))
    tuning = build_tuning(config, plan.spec, plan.stages, groups)
    tuning.step()
    step, backbone, exits = (figure.value for figure in memory_figures(tuning))
    trained = [parameter for stage in tuning.engine.chunks.stages for parameter in stage.parameters() if parameter.requires_grad]
    assert all(parameter.grad is None for parameter in trained), "gradients go to their buffers"
    hidden = tuning.hidden_states()
    return {
        "step": step * 1e6,
        "backbone": backbone * 1e6,
        "exits": exits * 1e6,
        "hidden": hidden.numel() * hidden.element_size(),
        "again": peak_bytes(tuning.step),
    }


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["single", "pp2", "tp2"])
def test_a_step_needs_no_more_than_its_parts(layout: str) -> None:
    found = workers.run(1 if layout == "single" else 2, memory, f"parallel={layout}")
    assert len({row["step"] for row in found}) == 1, "every rank reports the same"
    assert found[0]["step"] <= found[0]["backbone"] + found[0]["exits"]


@pytest.mark.dist
def test_no_activation_of_the_backbone_is_kept() -> None:
    """Four times the microbatches, a third of the layers below the deepest exit: the same peak, to a labels' worth."""
    (usual,) = workers.run(1, memory)
    (many,) = workers.run(1, memory, "data.global_batch_size=32")
    (shallow,) = workers.run(1, memory, "exits.layers=[2,4]")
    assert usual["again"] == pytest.approx(usual["step"], abs=usual["hidden"] / 2)
    for other in (many, shallow):
        assert other["step"] == pytest.approx(usual["step"], abs=usual["hidden"] / 2)
