"""The executor on stages that sleep for as long as their passes are said to take, over real messages between real ranks."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from eellm.data.batch import GlobalBatch
from eellm.engine.executor import ProgramEngine, Schedule
from eellm.layout import ParallelLayout
from eellm.mcore.groups import init_groups
from eellm.model.objective import HeadWeights, ObjectiveOptions
from eellm.schedule.bubble_filling import Filling
from eellm.schedule.costs import Costs, StageCosts, backward_pass, forward_only_pass, forward_pass
from eellm.schedule.measured import Recorded
from eellm.schedule.program import Program
from eellm.schedule.weights import Filled

SEQUENCE, WIDTH = 4, 8


class Sleep(torch.autograd.Function):
    """Identity that takes `there` seconds, and `back` seconds backward."""

    @staticmethod
    def forward(ctx, hidden, there, back):  # type: ignore[no-untyped-def]
        ctx.back = back
        time.sleep(there)
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        time.sleep(ctx.back)
        return grad, None, None


class SleepingStage(torch.nn.Module):
    """What the executor asks of a stage, and of its wrapper."""

    embedding = None

    def __init__(self, index: int, last: bool, costs: StageCosts, deferred: bool):
        super().__init__()
        self.start = torch.nn.Parameter(torch.zeros(SEQUENCE, 1, WIDTH))
        self.stage_spec, self.post_process = SimpleNamespace(index=index), last
        self.there, self.back = forward_pass(costs, deferred).length, backward_pass(costs, deferred, split=False).length
        self.only = forward_only_pass(costs, with_heads=False).length
        self.hidden: torch.Tensor | None = None

    def set_input_tensor(self, hidden: torch.Tensor | None) -> None:
        self.hidden = hidden

    def forward(self, *_: object) -> torch.Tensor:
        hidden = self.start if self.hidden is None else self.hidden
        slept = Sleep.apply(hidden, self.there if torch.is_grad_enabled() else self.only, self.back)
        return slept.sum() if self.post_process else slept

    def no_sync(self) -> Any:
        return nullcontext()


def slept(rank: int, program: Program, filling: Filling | None, costs: Costs, repeats: int) -> list[list[Recorded]]:
    """What this rank's recorder saw of each of some steps."""
    schedule = Schedule(program) if filling is None else Schedule(program, partial(Filled, filling))
    layout = ParallelLayout(pp=program.pp, vp=program.num_chunks, global_batch_size=program.num_microbatches)
    groups = init_groups(layout, torch.device("cpu"), [])
    own = [(index, costs.stages[index]) for index in layout.stages_of(rank)]
    stages = [SleepingStage(index, index == program.num_stages - 1, cost, costs.deferred) for index, cost in own]
    config = SimpleNamespace(sequence_parallel=False, params_dtype=torch.float32, finalize_model_grads_func=lambda *_: None)
    spec = SimpleNamespace(hidden_size=WIDTH, heads=["final"], exits=())
    plan = [SimpleNamespace(index=index, exits=()) for index in range(program.num_stages)]
    chunks = SimpleNamespace(spec=spec, plan=plan, groups=groups, config=config, stages=stages, wrapped=stages)
    engine = ProgramEngine(chunks, ObjectiveOptions(), lambda _: schedule)  # type: ignore[arg-type]
    tokens = torch.zeros(program.num_microbatches, 1, SEQUENCE, dtype=torch.long)
    batch = GlobalBatch(tokens, tokens, torch.ones(tokens.shape), tokens)
    steps = []
    for _ in range(repeats):
        events: list[Recorded] = []
        engine.recorder = events.append
        torch.distributed.barrier()
        engine.run(batch, HeadWeights({"final": 1.0}))
        steps.append([Recorded(event.action, event.begin, event.end) for event in events])
    return steps
