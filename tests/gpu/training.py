"""One pipeline stage in training: the second of the published 1.3B layout, whose last layer has an exit behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from eellm.benchmark.live_memory import peak_bytes
from eellm.config.compose import compose
from eellm.data.batch import Microbatch
from eellm.errors import MissingExtra
from eellm.layout import ParallelLayout
from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.groups import Groups
from eellm.mcore.parts import transformer_config
from eellm.metrics.flops import BACKWARD, head_flops, layer_flops
from eellm.model.initialise import initialise
from eellm.model.objective import HeadWeights, LossSums, Objective, ObjectiveOptions
from eellm.model.spec import ExitSpec, ModelSpec, build_spec, plan_stages
from eellm.model.stage import Stage
from tests.gpu.stages import SEED, groups_on
from tests.gpu.timing import Scale, seconds, table

LAYOUT = ParallelLayout(pp=4)
IN_FLIGHT = (1, 4)


@dataclass
class OneStage:
    """A stage with gradients in place, and the microbatch that it is run with."""

    stage: Stage
    batch: Microbatch
    hidden: torch.Tensor

    @classmethod
    def build(cls, spec: ModelSpec, groups: Groups, micro_batch: int, sequence: int) -> OneStage:
        device, config = groups.device, transformer_config(spec, ParallelLayout(), "bf16", on_cpu=groups.device.type == "cpu")
        with cpu_stand_ins():
            stage = Stage(spec, plan_stages(spec, LAYOUT)[1], config, [], groups.tp).to(device)
        initialise(stage, SEED, groups.tp_rank)
        for parameter in stage.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tokens = torch.randint(spec.vocab_size, (micro_batch, sequence), device=device)
        positions = torch.arange(sequence, device=device).expand(micro_batch, -1)
        batch = Microbatch(tokens, tokens, torch.ones(tokens.shape, device=device), positions)
        shape = (sequence, micro_batch, spec.hidden_size)
        return cls(stage, batch, torch.randn(shape, device=device, dtype=torch.bfloat16))

    def step(self, deferred: bool = True, in_flight: int = 1) -> None:
        """Forward passes of so many microbatches, then their backward passes; what was sent on is let go."""
        pending, options = [], ObjectiveOptions(deferred)
        with cpu_stand_ins():
            for _ in range(in_flight):
                self.stage.set_input_tensor(self.hidden.detach().requires_grad_())
                weights = HeadWeights({exit_.name: 1.0 for exit_ in self.stage.stage_spec.exits})
                objective = Objective(self.batch, weights, options, LossSums(), lambda: 1.0)
                pending.append(self.stage(self.batch, objective).sum())
            while pending:
                pending.pop(0).backward()


def stage_flops(stage: Stage, tokens: int, sequence: int) -> int:
    """Forward and backward, of layers and exits."""
    part = stage.stage_spec
    exits = sum(head_flops(stage.spec, exit_, sequence) for exit_ in part.exits)
    return (1 + BACKWARD) * tokens * (part.num_layers * layer_flops(stage.spec, sequence) + exits)


def training(device: torch.device, scale: Scale) -> None:
    """Time with and without the exit against FLOPs, by attention kernel; what a microbatch in flight adds to memory."""
    if device.type == "cuda":
        config = compose(["task=plan", "experiment=eellm_1_3b"])
        spec, micro_batch, sequence = build_spec(config, 32000), config.data.micro_batch_size, config.data.sequence_length
    else:
        exits, heads = (ExitSpec(scale.layers // 2),), scale.width // 32
        spec = ModelSpec(scale.layers, scale.width, heads, heads, 32, 3 * scale.width, 1000, 1024, scale.sequence, exits)
        micro_batch, sequence = 2, scale.sequence
    with groups_on(device, ParallelLayout(), [0]) as groups:
        rows: list[list[str]] = []
        missing: list[str] = []
        for kernel in ("sdpa", "flash_attn"):
            try:
                rows += timed_rows(replace(spec, attention=kernel), groups, (micro_batch, sequence), scale.repeats)
            except MissingExtra as error:
                missing.append(f"{kernel}: not here, {error}")
        layers = f"{spec.num_layers} layers of width {spec.hidden_size}"
        print(f"\ntraining, bf16: the second of 4 stages of {layers}, {micro_batch} x {sequence} tokens")
        table(["kernel", "exits", "ms", "TFLOP/s", "time, ratio", "FLOPs, ratio", "peak MB"], rows)
        print(*missing, sep="\n")
        memory_table(OneStage.build(spec, groups, micro_batch, sequence))


def timed_rows(spec: ModelSpec, groups: Groups, shape: tuple[int, int], repeats: int) -> list[list[str]]:
    """Without exits and with: (micro-batch, sequence) forward and backward."""
    rows: list[list[str]] = []
    first: tuple[float, int] | None = None
    for own in (replace(spec, exits=()), spec):
        one = OneStage.build(own, groups, *shape)
        took, flops = seconds(groups.device, one.step, repeats), stage_flops(one.stage, shape[0] * shape[1], shape[1])
        first = first or (took, flops)
        ratios = [f"{took / first[0]:.3f}", f"{flops / first[1]:.3f}"]
        rate, peak = f"{flops / took / 1e12:.3g}", f"{peak_bytes(one.step) / 1e6:.1f}"
        rows.append([spec.attention, str(len(one.stage.stage_spec.exits)), f"{took * 1e3:.2f}", rate, *ratios, peak])
    return rows


def memory_table(one: OneStage) -> None:
    """Peaks with some microbatches in flight."""
    rows = []
    for deferred in (True, False):
        peaks = [peak_bytes(lambda count=count, deferred=deferred: one.step(deferred, count)) for count in IN_FLIGHT]
        growth = (peaks[1] - peaks[0]) / (IN_FLIGHT[1] - IN_FLIGHT[0])
        rows.append(["deferred" if deferred else "eager", *(f"{peak / 1e6:.1f}" for peak in peaks), f"{growth / 1e6:.2f}"])
    print("\ntraining: memory with an exit at the stage's end, MB")
    table(["exit", *(f"{count} in flight" for count in IN_FLIGHT), "for each further one"], rows)
