"""The engine that runs any schedule: a program's actions, one after the other, with messages between pipeline ranks.

Behind the engine protocol it does what megatron-core's schedules do around their own order: loss scaling, gradient reduction
and finalisation, freeing of outputs that have been sent. Sends and receives are those of the program, whose invariants
(`eellm.schedule.invariants`) say that they meet.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from eellm.data.batch import GlobalBatch
from eellm.engine.chunks import Chunks
from eellm.engine.megatron import MegatronEngine
from eellm.engine.messages import Messages
from eellm.engine.protocol import Losses, VisitorOf, reduce_losses
from eellm.engine.recording import Recorder, Stopwatch, TimedHeads, timed_embedding
from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.schedules import back_propagate, free_data, reduce_gradients
from eellm.model.context import Context
from eellm.model.objective import HeadWeights, LossSums, Objective, ObjectiveOptions
from eellm.model.stage import HeadVisitor, Readout
from eellm.schedule.program import COMMUNICATION, RECEIVES, Action, Kind, Program
from eellm.schedule.weights import Plain, Weights


@dataclass(frozen=True)
class Schedule:
    """A program with its communication written down, and from the tokens of its microbatches what these count for."""

    program: Program
    weights_of: Callable[[list[float]], Weights] = lambda tokens: Plain(sum(tokens))


class ProgramEngine:
    """Implements `eellm.engine.protocol.Engine`; `schedule_of(M)` is the schedule of a step of M microbatches.

    What runs forward only, validation and visits, runs on megatron-core's own schedules.
    """

    def __init__(self, chunks: Chunks, options: ObjectiveOptions, schedule_of: Callable[[int], Schedule]):
        self.chunks, self.options, self.schedule_of = chunks, options, schedule_of
        self.recorder: Recorder | None = None
        self._forward_only = MegatronEngine(chunks, options)

    @property
    def grad_scale(self) -> Callable[[], float]:
        """The factor that the optimizer applies to losses (fp16's loss scale); exits take the same."""
        return self._forward_only.grad_scale

    @grad_scale.setter
    def grad_scale(self, scale: Callable[[], float]) -> None:
        self._forward_only.grad_scale = scale

    def run(self, batch: GlobalBatch, weights: HeadWeights, forward_only: bool = False) -> Losses:
        if forward_only:
            return self._forward_only.run(batch, weights, forward_only=True)
        schedule, groups = self.schedule_of(len(batch)), self.chunks.groups
        own = batch.loss_mask.sum(dim=(1, 2)).double()
        everybodys = own.clone()
        dist.all_reduce(everybodys, group=groups.dp)
        counts = schedule.weights_of(everybodys.tolist())
        step = _Step(self, schedule.program, counts, batch, weights)
        for chunk in self.chunks.wrapped:
            chunk.train()
        with cpu_stand_ins():
            step.run()
            reduce_gradients(self.chunks.wrapped, self.chunks.config, int(own.sum()), groups.device)
        return reduce_losses(step.sums, self.chunks.spec.heads, int(own.sum()), groups, self._computed(own, schedule))

    def visit(self, batch: GlobalBatch, visitor_of: VisitorOf) -> None:
        self._forward_only.visit(batch, visitor_of)

    def _computed(self, tokens: torch.Tensor, schedule: Schedule) -> dict[str, float]:
        """Head -> tokens of this data-parallel rank that its loss was computed for."""
        counts = schedule.weights_of(tokens.tolist())
        stage_of = {exit_.layer: stage.index for stage in self.chunks.plan for exit_ in stage.exits}
        computed = {exit_.name: counts.exit_tokens(stage_of[exit_.layer]) for exit_ in self.chunks.spec.exits}
        return computed | {"final": counts.exit_tokens(len(self.chunks.plan) - 1)}


class Passing(HeadVisitor):
    """Hidden states go by all heads: their microbatch is not back-propagated here."""

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        return hidden

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        return hidden.new_zeros(())


@dataclass
class _Step:
    """One optimizer step on this rank. What exists only between two actions is in dictionaries that are empty at the end."""

    engine: ProgramEngine
    program: Program
    counts: Weights
    batch: GlobalBatch
    weights: HeadWeights
    sums: LossSums = field(default_factory=LossSums)
    alive: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor]] = field(default_factory=dict)
    """(microbatch, chunk) -> (input, output) that a backward pass will need."""

    def __post_init__(self) -> None:
        chunks = self.engine.chunks
        self.rank = chunks.groups.pp_rank
        self.actions = self.program.ranks[self.rank]
        sequence = self.batch.tokens.shape[2] // (chunks.groups.layout.tp if chunks.config.sequence_parallel else 1)
        shape = (sequence, self.batch.tokens.shape[1], chunks.spec.hidden_size)
        self.messages = Messages(self.program, chunks.groups, shape, chunks.config.params_dtype)
        recorder = self.engine.recorder
        self.watch = None if recorder is None else Stopwatch(chunks.groups.device, recorder)

    def run(self) -> None:
        last = {action.chunk: action for action in self.actions if action.kind is Kind.BACKWARD}
        with ExitStack() as stack:
            unreduced = {chunk: stack.enter_context(ExitStack()) for chunk in last}
            for chunk, until in unreduced.items():
                until.enter_context(self.engine.chunks.wrapped[chunk].no_sync())
            for action in self.actions:
                if action == last.get(action.chunk):
                    unreduced[action.chunk].close()  # gradients of this pass are the last ones: they may be reduced
                self.messages.wait_for_input(action)
                with nullcontext() if self.watch is None else self.watch.timed(action):
                    self._do(action)
        self.messages.finish()
        assert not self.alive, f"never back-propagated: {sorted(self.alive)}"

    def _do(self, action: Action) -> None:
        if action.kind in RECEIVES:
            self.messages.receive(action)
        elif action.kind in COMMUNICATION:
            self.messages.send(action)
        elif action.kind is Kind.BACKWARD:
            self._backward(action)
        else:
            self._forward(action)

    def _forward(self, action: Action) -> None:
        _, index, number = action
        chunks, keep = self.engine.chunks, action.kind is Kind.FORWARD
        stage = chunks.stages[number]
        hidden = self.messages.hidden(action)
        if hidden is not None and keep:
            hidden.requires_grad_()
        stage.set_input_tensor(hidden)
        visitor = self._visitor(stage.stage_spec.index, index) if keep else Passing()
        with torch.set_grad_enabled(keep), nullcontext() if self.watch is None else timed_embedding(stage, self.watch):
            output = chunks.wrapped[number](self.batch[index], visitor)
        self.messages.made(action, output)
        if not keep:
            return
        self.alive[index, number] = hidden, output
        if not stage.post_process:
            free_data(output)

    def _visitor(self, stage: int, microbatch: int) -> HeadVisitor:
        exits, final = self.counts.exit(stage, microbatch), self.counts.final()
        values = {name: value * (final if name == "final" else exits) for name, value in self.weights.values.items()}
        weights = HeadWeights(values, self.weights.token_confidence)
        objective = Objective(self.batch[microbatch], weights, self.engine.options, self.sums, self.engine.grad_scale)
        return objective if self.watch is None else TimedHeads(objective, self.watch)

    def _backward(self, action: Action) -> None:
        _, index, number = action
        hidden, output = self.alive.pop((index, number))
        stage = self.engine.chunks.stages[number]
        grad = self.messages.gradient(action)
        if stage.post_process:
            grad = torch.full_like(output, self.engine.grad_scale())
        elif grad is None:  # the loss of this stage's exits is all that there is
            grad = self.messages.empty().zero_()
        else:
            factor = self.counts.received(stage.stage_spec.index, index)
            grad = grad if factor == 1.0 else grad.mul_(factor)
        back_propagate(output, grad)
        if hidden is not None:
            assert hidden.grad is not None
            self.messages.made(action, hidden.grad)
