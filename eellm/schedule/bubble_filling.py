"""EE-LLM's bubble filling (arXiv 2312.04916, section 3.3): partial microbatches in the bubbles of 1F1B, unbiased here.

Part 1 fills the warm-up bubble of the first stages: forward and backward there only, with the losses of exits. Part 2 fills
the cool-down bubble of the last stages: forward everywhere, backward there only. Microbatches are numbered: N ordinary ones,
then those of part 2, then those of part 1. What each counts for is in `eellm.schedule.weights`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from eellm.schedule.program import Action, Kind, Program, ScheduleError, backwards, forwards, one_by_one


@dataclass(frozen=True)
class Filling:
    """Who does what: `reach[j]` stages, from the first, run part-1 microbatch j; part-2 microbatch j is back-propagated by
    the stages from `begins[j]` on."""

    pp: int
    num_microbatches: int
    reach: tuple[int, ...]
    begins: tuple[int, ...]

    @property
    def ordinary(self) -> int:
        """N, the microbatches that all stages run whole."""
        return self.num_microbatches - len(self.reach) - len(self.begins)

    def part_one_on(self, stage: int) -> int:
        """n: the part-1 microbatches that a stage runs; they compute all its exits' losses."""
        return sum(stage < reach for reach in self.reach)

    def part_two_on(self, stage: int) -> int:
        """c: the part-2 microbatches that a stage back-propagates."""
        return sum(stage >= first for first in self.begins)

    @cached_property
    def part_one(self) -> range:
        return range(self.num_microbatches - len(self.reach), self.num_microbatches)


def most_fillers(pp: int, ratio: float) -> int:
    """K = floor((P-1) r / (1+r)): the microbatches that fit into one bubble, r = backward time / forward time."""
    return int((pp - 1) * ratio / (1 + ratio) + 1e-9)


def fill(
    pp: int,
    num_microbatches: int,
    exit_stages: Collection[int],
    ratio: float = 2.0,
    part_one: int | None = None,
    part_two: int | None = None,
) -> Filling:
    """How many microbatches fill each bubble, and which stages they reach; counts of None are the most that fit.

    A part-1 microbatch goes no further than the last stage with an exit within its reach, and there is none where no exit
    is. Counts above the most that fit are lowered to it, as EE-LLM does. Raises ScheduleError where no ordinary microbatch
    would be left.
    """
    most = most_fillers(pp, ratio)
    first = most if part_one is None else min(part_one, most)
    second = most if part_two is None else min(part_two, most)
    if num_microbatches - first - second < 1:
        reason = f"{first} microbatches of part 1 and {second} of part 2 leave none of {num_microbatches} whole"
        raise ScheduleError(f"bubble filling: {reason}")
    room = [min(first, int(max(0.0, ratio * (pp - 1 - stage) - stage) / (1 + ratio) + 1e-9)) for stage in range(pp)]
    reach = [_up_to_an_exit(sum(count > index for count in room), exit_stages) for index in range(first)]
    late = [min(second, int(ratio * stage / (1 + ratio) + 1e-9)) for stage in range(pp)]
    begins = [sum(count <= index for count in late) for index in range(second)]
    return Filling(pp, num_microbatches, tuple(filter(None, reach)), tuple(begins))


def _up_to_an_exit(reach: int, exit_stages: Collection[int]) -> int:
    return max((stage + 1 for stage in exit_stages if stage < reach), default=0)


def bubble_filling(filling: Filling) -> Program:
    """1F1B with one more warm-up forward on each rank than Megatron's, then backward before forward, and the fillers."""
    ranks = [_rank(filling, stage) for stage in range(filling.pp)]
    return Program("bubble_filling", filling.num_microbatches, 1, tuple(map(tuple, ranks)))


def _rank(filling: Filling, stage: int) -> list[Action]:
    through = filling.num_microbatches - len(filling.reach)
    kept = {filling.ordinary + index for index, first in enumerate(filling.begins) if stage >= first}
    kept |= set(range(filling.ordinary))
    forward = [Action(Kind.FORWARD if index in kept else Kind.FORWARD_ONLY, index) for index in range(through)]
    backward = backwards(index for index in range(through) if index in kept)
    warmup = min(filling.pp - stage, through)
    fillers = [filling.part_one[index] for index, reach in enumerate(filling.reach) if stage < reach]
    middle = [*forwards(fillers), *backwards(reversed(fillers))]
    return [*forward[:warmup], *middle, *one_by_one(backward, forward[warmup:])]
