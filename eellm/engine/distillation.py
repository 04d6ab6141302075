"""Self-distillation of exits to the final head, wherever on the pipeline both lie.

The last stage sends what the final head makes of a microbatch to the stages with exits. Its features go, [s, b, h] like hidden
states, not its logits, which are vocabulary / h times as much; the matrix that they are multiplied with is frozen, and every
stage with exits holds it (`ModelSpec.distils`). The other way round, hidden states of all exits would go to the last
stage, whose memory and time would be those of all heads.

Until it knows what the final head says a stage keeps hidden states at exits, of the microbatches that are between it and the
last stage: about as many as there are stages, with interleaving twice as many, however many a step has.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from eellm.data.batch import Microbatch
from eellm.engine.chunks import Chunks
from eellm.engine.tuned_exits import TuningObjective
from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.groups import group_of_holders
from eellm.mcore.parts import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from eellm.model.context import Context
from eellm.model.divergence import DivergenceOptions, Teacher, linear_divergence
from eellm.model.stage import HeadVisitor, Readout


@dataclass(frozen=True)
class Distillation:
    """See the config's `tuning.distillation`. The model is built as a whole."""

    share: float
    temperature: float


class Teaching:
    """Messages from the last pipeline rank to the others that hold exits, in a group of their own: between two ranks messages
    are told apart by their order alone, and these cross those of the schedule."""

    def __init__(self, chunks: Chunks, distillation: Distillation):
        groups = chunks.groups
        self.chunks, self.groups, self.distillation = chunks, groups, distillation
        self.sequence_parallel = chunks.config.sequence_parallel
        last = len(chunks.plan) - 1
        exits = [stage.index for stage in chunks.plan if stage.exits]
        self.group = group_of_holders(groups.layout, [*exits, last])
        teaches = groups.pp_rank == groups.layout.pp - 1
        self.learns = not teaches and any(stage.stage_spec.exits for stage in chunks.stages)
        copies = [stage.tied_weight() for stage in chunks.stages]
        self.matrix = next((weight for weight in copies if weight is not None), None)
        """The model's output matrix [v, h], on ranks that teach or learn."""
        self._sending: list[tuple[torch.Tensor, dist.Work]] = []

    def send(self, features: torch.Tensor) -> None:
        """[s, b, h] of the next microbatch; returns before it has arrived, and after those before it have."""
        if self.group is None:
            return
        self.finish()  # whoever this microbatch has come through already receives those before it
        part = (scatter_to_sequence_parallel_region(features) if self.sequence_parallel else features).contiguous()
        for learner in range(self.group.size() - 1):  # ranks of a group are sorted: the teacher is its last
            work = dist.isend(part, group=self.group, group_dst=learner)
            assert work is not None
            self._sending.append((part, work))

    def expect(self, microbatch: Microbatch) -> tuple[torch.Tensor, dist.Work]:
        """Begin to receive the next microbatch's features."""
        assert self.group is not None, "teacher and learner are two"
        batch, sequence = microbatch.tokens.shape
        length = sequence // (self.groups.layout.tp if self.sequence_parallel else 1)
        shape = length, batch, self.chunks.spec.hidden_size
        part = torch.empty(shape, dtype=self.chunks.config.params_dtype, device=self.groups.device)
        work = dist.irecv(part, group=self.group, group_src=self.group.size() - 1)
        assert work is not None
        return part, work

    def received(self, expected: tuple[torch.Tensor, dist.Work]) -> torch.Tensor:
        """[s, b, h], when they are there."""
        part, work = expected
        work.wait()
        if not self.sequence_parallel:
            return part
        return gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=False)

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for _, work in self._sending:
            work.wait()
        self._sending.clear()


class DistillingObjective(TuningObjective):
    """Of one microbatch in all chunks of a rank: its hidden states at exits wait for what the final head makes of it."""

    def __init__(self, *parts: Any, teaching: Teaching):
        super().__init__(*parts)
        self.teaching = teaching
        self._waiting: list[tuple[torch.Tensor, Readout, Context]] = []
        self._teacher: Teacher | None = None

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        # as a tensor of its own: the schedule empties what it has sent
        self._waiting.append((hidden.detach(), readout, context))
        return hidden

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        features = readout.head.features(hidden, context)
        self.teaching.send(features)
        self.learn(features)
        return self._text_loss(features, readout)

    def learn(self, features: torch.Tensor) -> None:
        """Forward and backward of the exits that wait, from the final head's features [s, b, h]."""
        assert self.teaching.matrix is not None
        self._teacher = Teacher(features.flatten(0, 1), self.teaching.matrix)
        for waiting in self._waiting:
            super().at_exit(*waiting)
        self._waiting.clear()

    def _loss(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        """(1 - share) of the text's loss and `share` of the divergence."""
        assert self._teacher is not None
        distillation = self.teaching.distillation
        share, temperature = distillation.share, distillation.temperature
        features = readout.head.features(hidden, context)
        options = DivergenceOptions(readout.head.temperature, temperature, self.options.chunk, self.scale())
        mask = self.batch.loss_mask.t().reshape(-1)
        divergence = linear_divergence(features.flatten(0, 1), readout.weight, self._teacher, mask, readout.vocabulary, options)
        text = self._text_loss(features, readout)
        return (1 - share) * text + share * self.weights.values[readout.name] * divergence


class DistilledExits:
    """Implements `eellm.engine.tuned_exits.TunedExits`.

    The final head's features of a microbatch leave the last rank P - p passes after rank p of P began its last pass of it; the
    exits run then, before the rank's next pass. No rank can wait for ever: what it waits for needs nothing more of it.
    """

    def __init__(self, objective_of: Callable[[Microbatch], DistillingObjective], teaching: Teaching):
        self._objective_of, self._teaching = objective_of, teaching
        self._num_chunks = len(teaching.chunks.stages)
        self._ahead = teaching.groups.layout.pp - teaching.groups.pp_rank
        self._turn = 0
        self._passes: Counter[int] = Counter()
        self._objectives: dict[int, DistillingObjective] = {}
        self._due: deque[tuple[int, DistillingObjective, tuple[torch.Tensor, dist.Work]]] = deque()

    def visitor(self, index: int, microbatch: Microbatch) -> HeadVisitor:
        self._turn += 1
        self._learn_until(self._turn)
        objective = self._objectives.setdefault(index, self._objective_of(microbatch))
        self._passes[index] += 1
        if self._passes[index] == self._num_chunks:
            del self._objectives[index]
            if self._teaching.learns:
                expected = self._teaching.expect(microbatch)
                self._due.append((self._turn + self._ahead, objective, expected))
        return objective

    def finish(self) -> None:
        self._learn_until(self._turn + self._ahead)
        self._teaching.finish()

    def _learn_until(self, turn: int) -> None:
        with cpu_stand_ins(), torch.no_grad():
            while self._due and self._due[0][0] <= turn:
                _, objective, expected = self._due.popleft()
                objective.learn(self._teaching.received(expected))
