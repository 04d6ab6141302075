"""The FLOPs that are logged against torch's own counter around a real step."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from eellm.engine.megatron import MegatronEngine
from eellm.metrics.flops import forward_flops, training_flops
from eellm.model.objective import ObjectiveOptions
from eellm.model.spec import ExitSpec
from tests import workers
from tests.engine.layouts import GLOBAL_BATCH, SEQUENCE, Case, build, global_batch, tiny_spec

ALL_HEADS = (ExitSpec(1, "embedding"), ExitSpec(2, "mlp", tie_output=False), ExitSpec(3, "block"), ExitSpec(4, "norm"))

FORMULAS = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


class Counter(TorchDispatchMode):
    """torch's formulas for every operation that runs. (Its FlopCounterMode also follows modules, by hooks that autograd refuses
    inside the nested backward of a deferred exit.)"""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in FORMULAS:
            self.total += FORMULAS[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def counted(rank: int, case: Case) -> tuple[int, int]:
    """(training, forward only) FLOPs of one global batch."""
    chunks = build(case, rank)
    engine = MegatronEngine(chunks, case.options)
    totals = []
    for forward_only in (False, True):
        with Counter() as counter:
            engine.run(global_batch(case), case.weights, forward_only)
        totals.append(counter.total)
    return totals[0], totals[1]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("deferred", [True, False])
def test_logged_flops_are_those_executed(activation: str, deferred: bool) -> None:
    # the counter does not know the CPU's fused attention kernel
    spec = tiny_spec(exits=ALL_HEADS, attention="unfused", activation=activation, vocab_size=64)
    case = Case(spec, options=ObjectiveOptions(deferred, 1000))
    ((training, forward),) = workers.run(1, counted, case)
    tokens = GLOBAL_BATCH * SEQUENCE
    assert training_flops(spec, SEQUENCE) * tokens == pytest.approx(training, rel=0.01)
    assert forward_flops(spec, SEQUENCE) * tokens == pytest.approx(forward, rel=0.01)


def test_an_exit_is_computed_once_per_direction() -> None:
    """What an exit adds to a step is its own forward and backward, deferred or not."""
    bare, with_exit = (tiny_spec(exits=exits, attention="unfused", vocab_size=64) for exits in ((), (ExitSpec(2),)))
    totals = [workers.run(1, counted, Case(spec, options=ObjectiveOptions(True, 1000)))[0][0] for spec in (bare, with_exit)]
    head = 3 * 2 * 64 * bare.hidden_size * GLOBAL_BATCH * SEQUENCE
    assert totals[1] - totals[0] == head
