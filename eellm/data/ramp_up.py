"""How many sequences an optimizer step reads while the batch grows: a pure function of the samples consumed before it."""

from __future__ import annotations

from dataclasses import dataclass

from eellm.config.schema import DataConfig, RampUpConfig


@dataclass(frozen=True)
class BatchSizes:
    """Sequences of every step: `final`, or on the way there what `ramp_up` says.

    As Megatron-LM's `--rampup-batch-size START INCREMENT SAMPLES`: the size grows from `start` to `final` in equal
    increments, each after an equal share of the first `samples` samples. `final - start` is a multiple of `increment`.
    """

    final: int
    ramp_up: RampUpConfig | None = None

    @classmethod
    def of(cls, data: DataConfig) -> BatchSizes:
        return cls(data.global_batch_size, data.ramp_up)

    def after(self, consumed: int) -> int:
        """Sequences of the step that begins after `consumed` samples."""
        ramp = self.ramp_up
        if ramp is None or consumed >= ramp.samples:
            return self.final
        return ramp.start + consumed * self._increments(ramp) // ramp.samples * ramp.increment

    def step(self, number: int, consumed: int = 0) -> tuple[int, int]:
        """(first sample, sequences) of a step, where step 0 begins after `consumed` samples.

        Takes one turn per size of the ramp, so that any step is found at once.
        """
        ramp, first, size = self.ramp_up, consumed, self.after(consumed)
        while ramp is not None and size < self.final:
            increments = (size - ramp.start) // ramp.increment + 1
            end = -(-increments * ramp.samples // self._increments(ramp))  # consumed samples from which on the size grows
            steps = -(-(end - first) // size)
            if number < steps:
                break
            number, first = number - steps, first + steps * size
            size = self.after(first)
        return first + number * size, size

    def _increments(self, ramp: RampUpConfig) -> int:
        return (self.final - ramp.start) // ramp.increment
