"""The model as plain data: what exists, where its exits are, and which stage owns what. No torch.

`ModelSpec` describes the network whatever the layout; `plan_stages` cuts it into virtual stages of
segments. Both training and inference are built from these.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from eellm.config.schema import Config, ModelConfig, RotaryScalingConfig
from eellm.layout import ParallelLayout, equal_split

GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class ExitSpec:
    """An output head after `layer` layers."""

    layer: int
    head: str = "norm"
    tie_output: bool = True
    temperature: float = 1.0

    @property
    def name(self) -> str:
        """Name in metrics, tables and plots, e.g. `exit_06`."""
        return f"exit_{self.layer:02d}"


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and options of an early-exit decoder-only Transformer; every null of the config is resolved."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    padded_vocab_size: int
    max_positions: int
    exits: tuple[ExitSpec, ...] = ()
    activation: str = "swiglu"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_placement: str = "before"
    residual: str = "sequential"
    qk_norm: str = "none"
    position: str = "rotary"
    rotary_fraction: float = 1.0
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScalingConfig | None = None
    qkv_bias: bool = False
    linear_bias: bool = False
    sliding_window: int | None = None
    attention: str = "sdpa"
    tie_embeddings: bool = True
    init_std: float = 0.02
    exit_init: str = "random"
    depth: int | None = None
    """Layers that are built and run, with no final head behind them: tuning needs nothing above its deepest exit. None = all;
    0 = exits alone (`exits_alone`)."""
    distils: bool = False
    """Exits learn from the final head when they are tuned, so that every stage with exits holds the model's output matrix."""

    @property
    def has_final_head(self) -> bool:
        return self.depth is None

    @property
    def built_layers(self) -> int:
        return self.num_layers if self.depth is None else self.depth

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def heads(self) -> list[str]:
        """Names of all heads in order of depth, the final one last."""
        return [exit_.name for exit_ in self.exits] + (["final"] if self.has_final_head else [])

    @property
    def exit_layers(self) -> list[int]:
        return [exit_.layer for exit_ in self.exits]

    def exit_at(self, layer: int) -> ExitSpec:
        return next(exit_ for exit_ in self.exits if exit_.layer == layer)


@dataclass(frozen=True)
class SegmentSpec:
    """A run of layers (1-based, possibly none) and the exit behind it, if any."""

    layers: tuple[int, ...]
    exit: ExitSpec | None = None


@dataclass(frozen=True)
class StageSpec:
    """One virtual stage: its segments and what stands at the ends of the network."""

    index: int
    segments: tuple[SegmentSpec, ...]
    has_embedding: bool
    has_final_head: bool
    num_layers: int

    @property
    def layers(self) -> list[int]:
        return [layer for segment in self.segments for layer in segment.layers]

    @property
    def exits(self) -> list[ExitSpec]:
        return [segment.exit for segment in self.segments if segment.exit is not None]


def resolved_ffn(model: ModelConfig) -> int:
    """4 x hidden, or for gated activations two thirds of it rounded up to a multiple of 64."""
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    if model.activation in GATED:
        return -(-8 * model.hidden_size // 3 // 64) * 64
    return 4 * model.hidden_size


def exit_layer(position: int | float, num_layers: int) -> int:
    """Layer of an exit given as a layer (int) or as a fraction of the depth (float)."""
    return round(position * num_layers) if isinstance(position, float) else position


def per_exit(value: object, count: int) -> list:
    """One value for all exits, or a list with one per exit."""
    return list(value) if isinstance(value, list) else [value] * count


def build_spec(config: Config, vocab_size: int) -> ModelSpec:
    """Resolve a validated config into a model; `vocab_size` is the tokenizer's where the config leaves it open."""
    model, exits = config.model, config.exits
    vocab_size = model.vocab_size or vocab_size
    count = len(exits.layers)
    columns = zip(
        [exit_layer(position, model.num_layers) for position in exits.layers],
        per_exit(exits.head, count),
        per_exit(exits.tie_output, count),
        per_exit(exits.temperature, count),
        strict=True,
    )
    return ModelSpec(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        head_dim=model.head_dim or model.hidden_size // model.num_attention_heads,
        ffn_hidden_size=resolved_ffn(model),
        vocab_size=vocab_size,
        padded_vocab_size=-(-vocab_size // model.vocab_multiple) * model.vocab_multiple,
        max_positions=model.max_positions or config.data.sequence_length,
        exits=tuple(ExitSpec(*column) for column in columns),
        activation=model.activation,
        norm=model.norm,
        norm_eps=model.norm_eps,
        norm_placement=model.norm_placement,
        residual=model.residual,
        qk_norm=model.qk_norm,
        position=model.position,
        rotary_fraction=model.rotary_fraction,
        rotary_base=model.rotary_base,
        rotary_scaling=model.rotary_scaling,
        qkv_bias=model.qkv_bias,
        linear_bias=model.linear_bias,
        sliding_window=model.sliding_window,
        attention=model.attention,
        tie_embeddings=model.tie_embeddings,
        init_std=model.init_std,
        exit_init=exits.init,
    )


def tuned_spec(spec: ModelSpec, layers: list[int], whole: bool = False) -> ModelSpec:
    """What tuning the exits after some layers builds and runs: those exits and what lies below them, or the `whole` model,
    from whose final head they learn."""
    exits = tuple(exit_ for exit_ in spec.exits if exit_.layer in layers)
    return replace(spec, exits=exits, depth=None if whole else max(layers), distils=whole)


def exits_alone(spec: ModelSpec, plan: list[StageSpec]) -> tuple[ModelSpec, list[StageSpec]]:
    """The exits of a spec with the matrices they use, each on its stage: all there is to tune from kept hidden states."""
    stages = [
        replace(stage, segments=tuple(SegmentSpec((), exit_) for exit_ in stage.exits), has_embedding=False, num_layers=0)
        for stage in plan
    ]
    return replace(spec, depth=0), stages


def build_layout(config: Config, dp: int | None = None) -> ParallelLayout:
    """Layout of a validated config; `dp` overrides an open `parallel.dp`."""
    parallel = config.parallel
    return ParallelLayout(
        tp=parallel.tp,
        pp=parallel.pp,
        vp=parallel.vp,
        dp=parallel.dp or dp or 1,
        sequence_parallel=parallel.sequence_parallel,
        micro_batch_size=config.data.micro_batch_size,
        global_batch_size=config.data.global_batch_size,
    )


@dataclass(frozen=True)
class Loads:
    """What a microbatch costs on one device, in any unit: the measure by which stages are balanced. `exits` by layer."""

    layer: float
    exits: Mapping[int, float]
    final: float
    embedding: float = 0.0

    @classmethod
    def of_products(cls, spec: ModelSpec) -> Loads:
        """Multiplications per token in matrix products."""
        exits = {exit_.layer: head_parameters(spec, exit_) for exit_ in spec.exits}
        return cls(layer_parameters(spec), exits, head_parameters(spec, None))

    def stage(self, stage: StageSpec) -> float:
        heads = sum(self.exits[exit_.layer] for exit_ in stage.exits) + self.final * stage.has_final_head
        return stage.num_layers * self.layer + heads + self.embedding * stage.has_embedding


def plan_stages(
    spec: ModelSpec,
    layout: ParallelLayout,
    layers_per_stage: list[int] | Literal["balance"] | None = None,
    boundary: str = "end",
    loads: Loads | None = None,
) -> list[StageSpec]:
    """Cut the model, as far as it is built, into virtual stages: equal ones unless told; `balance`: such that the slowest is as
    light as can be, by `loads` or else by the multiplications in matrix products.

    `boundary` says where an exit after the last layer of a stage is computed (architecture: `end` of that
    stage, `start` of the next, or `balance`: the choice with the lightest slowest stage). The parameters
    and their global names are the same for all three.
    """
    loads = loads or Loads.of_products(spec)
    if layers_per_stage == "balance":
        layers_per_stage = balanced_split(spec, layout.num_stages, boundary, loads)
    counts = layers_per_stage or equal_split(spec.built_layers, layout.num_stages)
    last = list(itertools.accumulate(counts))
    first = [end - count + 1 for end, count in zip(last, counts, strict=True)]
    on_boundary = [exit_.layer for exit_ in spec.exits if exit_.layer in last[:-1]]
    if boundary == "balance":
        choices = itertools.product((False, True), repeat=len(on_boundary))
        plans = (_cut(spec, first, last, dict(zip(on_boundary, choice, strict=True))) for choice in choices)
        return min(plans, key=lambda plan: max(map(loads.stage, plan)))
    return _cut(spec, first, last, dict.fromkeys(on_boundary, boundary == "start"))


def balanced_split(spec: ModelSpec, num_stages: int, boundary: str, loads: Loads) -> list[int]:
    """Layers of each stage, such that the slowest stage is as light as can be and, among such splits, loads are even. Exact, by
    dynamic programming over the ends of stages and the sides on which exits on them are computed."""
    layers = spec.built_layers
    sides = {"end": (False,), "start": (True,), "balance": (False, True)}[boundary]
    total = list(itertools.accumulate((loads.exits.get(layer, 0.0) for layer in range(1, layers + 1)), initial=0.0))
    # (layers so far, whether an exit on that boundary is left to the next stage) -> (slowest, sum of squares, split)
    best: dict[tuple[int, bool], tuple[float, float, tuple[int, ...]]] = {(0, False): (0.0, 0.0, ())}
    for stage in range(num_stages):
        after = num_stages - stage - 1
        found: dict[tuple[int, bool], tuple[float, float, tuple[int, ...]]] = {}
        for (begin, inherits), (slowest, squares, split) in best.items():
            for end in [layers] if not after else range(begin + 1, layers - after + 1):
                ends = loads.embedding * (not begin) + loads.final * (spec.has_final_head and not after)
                heads = total[end] - total[begin] + (loads.exits[begin] if inherits else 0.0)
                for leaves in sides if after and end in loads.exits else (False,):
                    cost = (end - begin) * loads.layer + heads + ends - (loads.exits[end] if leaves else 0.0)
                    way = (max(slowest, cost), squares + cost**2, (*split, end - begin))
                    found[end, leaves] = min(way, found.get((end, leaves), way))
        best = found
    return list(min(best.values())[2])


def _cut(spec: ModelSpec, first: list[int], last: list[int], at_start: dict[int, bool]) -> list[StageSpec]:
    stages = []
    for index, (start, end) in enumerate(zip(first, last, strict=True)):
        segments = []
        if index > 0 and at_start.get(start - 1, False):
            segments.append(SegmentSpec((), spec.exit_at(start - 1)))
        layers: list[int] = []
        for layer in range(start, end + 1):
            layers.append(layer)
            if layer in spec.exit_layers and not (layer == end and at_start.get(layer, False)):
                segments.append(SegmentSpec(tuple(layers), spec.exit_at(layer)))
                layers = []
        if layers:
            segments.append(SegmentSpec(tuple(layers)))
        stages.append(
            StageSpec(
                index=index,
                segments=tuple(segments),
                has_embedding=index == 0,
                has_final_head=spec.has_final_head and index == len(last) - 1,
                num_layers=end - start + 1,
            )
        )
    return stages


def layer_parameters(spec: ModelSpec) -> int:
    """Weights of the matrices of one decoder layer (norms and biases are not counted)."""
    attention = spec.hidden_size * spec.head_dim * (2 * spec.num_heads + 2 * spec.num_query_groups)
    mlp = spec.hidden_size * spec.ffn_hidden_size * (3 if spec.gated else 2)
    return attention + mlp


def parameters(spec: ModelSpec) -> int:
    """Weights of all matrices; norms and biases are not counted."""
    matrix = spec.padded_vocab_size * spec.hidden_size
    bodies = sum(head_parameters(spec, exit_) - matrix for exit_ in spec.exits)
    own_outputs = sum(not exit_.tie_output for exit_ in spec.exits) + (not spec.tie_embeddings)
    return spec.num_layers * layer_parameters(spec) + bodies + (1 + own_outputs) * matrix


def head_parameters(spec: ModelSpec, exit_: ExitSpec | None) -> int:
    """Weights multiplied per token by a head's matrices, tied or not; None = the final head."""
    output = spec.hidden_size * spec.padded_vocab_size
    if exit_ is None or exit_.head in ("embedding", "norm"):
        return output
    if exit_.head == "mlp":
        return output + spec.hidden_size * spec.ffn_hidden_size * (3 if spec.gated else 2)
    return output + layer_parameters(spec)


def tied_stages(spec: ModelSpec, stages: list[StageSpec]) -> list[int]:
    """Virtual stages that hold a copy of the model's output matrix because something on them uses it."""
    embeds = [stage.has_embedding and spec.tie_embeddings for stage in stages]
    return [stage.index for stage, tied in zip(stages, embeds, strict=True) if tied or uses_output_matrix(spec, stage)]


def uses_output_matrix(spec: ModelSpec, stage: StageSpec) -> bool:
    """Whether the model's output matrix is multiplied with on a stage."""
    return stage.has_final_head or any(exit_.tie_output or spec.distils for exit_ in stage.exits)
