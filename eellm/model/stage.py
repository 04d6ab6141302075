"""One virtual stage: the module that a pipeline rank holds, made of segments.

Parameter names are the same on every layout: `embedding.tokens.weight`, `layers.7.mlp.linear_fc1.weight`,
`heads.exit_06.norm.weight`, `heads.final.norm.weight`, `output.weight`.
Shape legend: s tokens, b sequences, h channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from eellm.data.batch import Microbatch
from eellm.mcore.parts import (
    MegatronModule,
    ModelType,
    TransformerConfig,
    VocabParallelEmbedding,
    make_viewless_tensor,
    scatter_to_sequence_parallel_region,
)
from eellm.model.context import Context, training_context
from eellm.model.heads import Head, OutputMatrix
from eellm.model.layer import DecoderLayer
from eellm.model.spec import ModelSpec, StageSpec, uses_output_matrix
from eellm.model.vocabulary import Vocabulary


class Modules(MegatronModule):
    """Named children. A plain ModuleDict would make megatron-core save tensor-parallel children as replicated."""

    def __init__(self, config: TransformerConfig, modules: Mapping[str, torch.nn.Module]):
        super().__init__(config)
        for name, module in modules.items():
            self.add_module(name, module)


class Embedding(MegatronModule):
    """Token embedding and learned positions: [b, s] -> [s, b, h] (s divided by tp under sequence parallelism)."""

    def __init__(self, spec: ModelSpec, config: TransformerConfig):
        super().__init__(config)
        self.tokens = VocabParallelEmbedding(
            spec.padded_vocab_size,
            spec.hidden_size,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        learned = spec.position == "learned"
        self.positions = torch.nn.Embedding(spec.max_positions, spec.hidden_size) if learned else None

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        embedded = self.tokens(tokens)
        hidden = embedded if self.config.sequence_parallel else embedded.transpose(0, 1).contiguous()
        if self.positions is None:
            return hidden
        learned = self.positions(positions.t())
        return hidden + (scatter_to_sequence_parallel_region(learned) if self.config.sequence_parallel else learned)


Matrix: TypeAlias = OutputMatrix | VocabParallelEmbedding
"""What holds an output matrix: itself, or the input embedding it is tied to."""


class Readout:
    """A head with the output matrix it uses: everything needed to turn hidden states into losses or tokens."""

    def __init__(self, head: Head, matrix: Matrix, vocabulary: Vocabulary):
        self.head, self.vocabulary = head, vocabulary
        self._matrix = matrix

    @property
    def name(self) -> str:
        return self.head.name

    @property
    def weight(self) -> torch.nn.Parameter:
        """[v, h], this rank's rows."""
        return self._matrix() if isinstance(self._matrix, OutputMatrix) else self._matrix.weight

    def parameters(self) -> list[torch.nn.Parameter]:
        """Trainable parameters behind the head, each once."""
        parameters = [p for name, p in self.head.named_parameters() if not name.startswith("output.")]
        return [p for p in [*parameters, self._matrix.weight] if p.requires_grad]


class HeadVisitor(Protocol):
    """What happens at the heads during a pass: a training loss, an evaluation, nothing."""

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        """Called with [s, b, h] after the exit's layer; returns the hidden states that go on."""
        ...

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        """Called after the last layer; returns the scalar that the schedule back-propagates."""
        ...


@dataclass(frozen=True)
class Segment:
    """A run of layers and the exit behind it; not a module: the stage owns the parameters."""

    layers: tuple[DecoderLayer, ...]
    exit: Readout | None

    def forward(self, hidden: torch.Tensor, context: Context, recompute: bool = False) -> torch.Tensor:
        """[s, b, h] -> [s, b, h] through the layers; the exit is the caller's business."""
        for layer in self.layers:
            if recompute:
                hidden = checkpoint(layer, hidden, context, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(hidden, context)
        return hidden


class Stage(MegatronModule):
    """The layers, exits and ends of one virtual stage, with the interface that Megatron's schedules expect."""

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False  # tied copies are ours (eellm.mcore.gradients), not mcore's

    def __init__(
        self, spec: ModelSpec, stage: StageSpec, config: TransformerConfig, tied: list[int], tp_group: dist.ProcessGroup
    ):
        super().__init__(config)
        self.spec, self.stage_spec = spec, stage
        self.pre_process, self.post_process = stage.has_embedding, stage.has_final_head
        self.vp_stage: int | None = None
        self.recompute = "none"
        self.input_tensor: torch.Tensor | None = None
        self.copy_index = tied.index(stage.index) if stage.index in tied else None
        self.embedding = Embedding(spec, config) if stage.has_embedding else None
        layers = {n: DecoderLayer(spec, config, str(n), n) for n in stage.layers}
        self.layers = Modules(config, {str(n): layer for n, layer in layers.items()})
        heads = {exit_.name: Head(spec, config, exit_) for exit_ in stage.exits}
        if stage.has_final_head:
            heads["final"] = Head(spec, config, None)
        self.heads, self._heads = Modules(config, heads), heads
        reads_embedding = stage.has_embedding and spec.tie_embeddings
        has_own = uses_output_matrix(spec, stage) and not reads_embedding
        self.output = OutputMatrix(spec, config) if has_own else None
        self.vocabulary = Vocabulary.of(spec.vocab_size, spec.padded_vocab_size, tp_group)
        self.to(config.params_dtype)
        self.segments = [
            Segment(
                layers=tuple(layers[number] for number in segment.layers),
                exit=self.readout(segment.exit.name) if segment.exit else None,
            )
            for segment in stage.segments
        ]

    @property
    def model_matrix(self) -> Matrix:
        """Module whose `weight` is this stage's copy of the model's output matrix."""
        if self.output is not None:
            return self.output
        assert self.embedding is not None, "a stage whose heads use the model's matrix holds a copy of it"
        return self.embedding.tokens

    def readout(self, name: str) -> Readout:
        head = self._heads[name]
        return Readout(head, head.output if head.output is not None else self.model_matrix, self.vocabulary)

    def freeze_backbone(self) -> None:
        """Leave gradients to what belongs to exits alone."""
        for name, parameter in self.named_parameters():
            if not name.startswith("heads.exit_"):
                parameter.requires_grad_(False)

    def set_recompute(self, recompute: str) -> None:
        """`none`, `selective` (attention kernels) or `full` (layers)."""
        self.recompute = recompute
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                module.attention.recompute = recompute == "selective"

    def set_input_tensor(self, tensor: list[torch.Tensor] | torch.Tensor | None) -> None:
        """Called by the schedule with what the previous stage sent."""
        self.input_tensor = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, batch: Microbatch, visitor: HeadVisitor) -> torch.Tensor:
        """Hidden states [s, b, h] for the next stage, or on the last stage what `visitor.at_final` returns."""
        hidden = self.input_tensor if self.embedding is None else self.embedding(batch.tokens, batch.positions)
        assert hidden is not None, "the schedule hands every later stage its input"
        context = training_context(self.spec, batch.positions, batch.documents, hidden.dtype)
        recompute = self.recompute == "full" and self.training and torch.is_grad_enabled()
        for segment in self.segments:
            hidden = segment.forward(hidden, context, recompute)
            if segment.exit is not None:
                hidden = visitor.at_exit(hidden, segment.exit, context)
        if self.post_process:
            return visitor.at_final(hidden, self.readout("final"), context)
        # the schedule deallocates a stage's output and refuses views of other tensors
        return make_viewless_tensor(hidden, requires_grad=hidden.requires_grad, keep_graph=True)

    def global_name(self, name: str) -> str:
        """Name of a parameter in checkpoints and for initialisation: copies of a tied matrix share one."""
        return "embedding.tokens.weight" if name == "output.weight" and self.spec.tie_embeddings else name

    def tied_weight(self) -> torch.nn.Parameter | None:
        """This stage's copy of the model's output matrix, if it holds one."""
        return None if self.copy_index is None else self.model_matrix.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's global view; further copies of the output matrix are replicas of the first."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.copy_index is not None:
            name = "output.weight" if self.output is not None else "embedding.tokens.weight"
            tensor = state[prefix + name]
            tensor.key = prefix + self.global_name(name)
            tensor.replica_id = (self.copy_index, *tensor.replica_id[1:])
        return state
