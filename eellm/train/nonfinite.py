"""Steps whose losses or gradients are NaN or infinite: where it is, and how many such steps a run forgives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from eellm.errors import NonFiniteError
from eellm.metrics import names
from eellm.model.spec import StageSpec
from eellm.model.stage import Stage

_SHOWN = 3
"""Parameters named for each stage."""

Gradients = Mapping[int, Sequence[str]]
"""Stage -> names of its parameters whose gradient is not finite."""


class NonFiniteSteps:
    """Counts the steps that were skipped. Every call and its outcome is the same on all ranks."""

    def __init__(self, allowed: int, plan: Sequence[StageSpec]):
        self.allowed, self.skipped = allowed, 0
        self._plan = plan

    def skip(self, step: int, losses: Mapping[str, float], stages: Sequence[Stage]) -> None:
        """Forgive step `step` (1-based), which has updated nothing. Raises NonFiniteError where it is one too many.

        `losses` are those of all heads, `stages` those of this rank, with their gradients.
        """
        if self.skipped == self.allowed:
            raise NonFiniteError(f"step {step}: {self._where(losses, stages)}.{self._advice()}")
        self.skipped += 1

    def _where(self, losses: Mapping[str, float], stages: Sequence[Stage]) -> str:
        wrong = {head: loss for head, loss in losses.items() if not math.isfinite(loss)}
        if wrong:
            found = [f"{head} (pipeline stage {self._stage_of(head)}) is {loss}" for head, loss in wrong.items()]
            return "the loss of " + ", of ".join(found)
        gradients = nonfinite_gradients(stages)
        if not gradients:
            return "the norm of the gradients is infinite, though each of them is finite"
        # the gradient comes from the last stage: what is wrong there has spread to those before it
        return "gradients are not finite: " + "; ".join(
            _listed(stage, gradients[stage]) for stage in sorted(gradients, reverse=True)
        )

    def _stage_of(self, head: str) -> int:
        return next(
            stage.index
            for stage in self._plan
            if (stage.has_final_head if head == names.FINAL else head in [exit_.name for exit_ in stage.exits])
        )

    def _advice(self) -> str:
        before = f" {self.skipped} such steps before it were skipped." if self.skipped else ""
        return (
            f"{before} Nothing was updated with it, and the checkpoints are from before. A lower optimizer.lr or"
            " optimizer.clip_grad may help, or precision=bf16 in place of fp16; trainer.max_nonfinite_steps lets a run skip some."
        )


def nonfinite_gradients(stages: Sequence[Stage]) -> Gradients:
    """By stage, on all ranks. Called by all ranks together; only a run that stops pays for it."""
    mine = {
        stage.stage_spec.index: [name for name, parameter in stage.named_parameters() if not _is_finite(parameter)]
        for stage in stages
    }
    parts: list[dict[int, list[str]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    found: dict[int, list[str]] = {}
    for part in parts:
        for stage, wrong in part.items():
            found[stage] = list(dict.fromkeys([*found.get(stage, []), *wrong]))
    return {stage: wrong for stage, wrong in found.items() if wrong}


def _is_finite(parameter: torch.nn.Parameter) -> bool:
    gradient = getattr(parameter, "main_grad", None)
    return gradient is None or bool(gradient.isfinite().all())


def _listed(stage: int, wrong: Sequence[str]) -> str:
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return f"pipeline stage {stage}: {', '.join(wrong[:_SHOWN])}{more}"
