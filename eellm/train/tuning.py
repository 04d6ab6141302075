"""The Lightning module that tunes exits behind a frozen backbone: the training module with another engine."""

from __future__ import annotations

from dataclasses import replace

import torch

from eellm.config.paths import expanded
from eellm.data.batches import training_batches
from eellm.data.cache import cache_key
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.engine.distillation import Distillation
from eellm.engine.hidden_cache import HiddenStates
from eellm.engine.protocol import TrainingEngine
from eellm.engine.tuning import TuningEngine
from eellm.mcore.data_parallel import ReductionOptions
from eellm.mcore.optimizer import MegatronOptimizer
from eellm.metrics import names
from eellm.metrics.flops import tuning_flops
from eellm.model.objective import HeadWeights, ObjectiveOptions
from eellm.model.spec import exits_alone
from eellm.train.module import EarlyExitModule


class TuningModule(EarlyExitModule):
    """Trains the exits of `spec` and nothing else. Each exit's gradients are clipped by their own norm, so that exits tuned
    together become what they become alone."""

    def _build_chunks(self) -> Chunks:
        config = self.run_config
        self.hidden_states = self._hidden_states()
        if self._passes_no_backbone():
            self.spec, self.plan = exits_alone(self.spec, self.plan)
        reduction = ReductionOptions(config.optimizer.distributed)  # once a step, of little: there is nothing to overlap
        options = ChunkOptions(config.precision.dtype, config.seed, reduction=reduction, exits_only=True)
        return build_chunks(self.spec, self.plan, self.groups, options)

    def _build_engine(self) -> TrainingEngine:
        options, wanted = ObjectiveOptions(chunk=self.run_config.trainer.loss_chunk), self.run_config.tuning.distillation
        distillation = Distillation(wanted.weight, wanted.temperature) if wanted.weight > 0 else None
        engine = TuningEngine(self.chunks, options, distillation)
        engine.hidden_states = self.hidden_states
        return engine

    def _passes_no_backbone(self) -> bool:
        """Whether all that the run reads lies in the cache: hidden states of its training samples, and nothing to validate on."""
        config, groups, states = self.run_config, self.groups, self.hidden_states
        if states is None or config.trainer.val_every:
            return False
        layers = [exit_.layer for stage in groups.layout.stages_of(groups.pp_rank) for exit_ in self.plan[stage].exits]
        batches = training_batches(config, self.corpus, groups.layout, groups.dp_rank, 0).plan
        ids = [batches.sample_ids(step).flatten() for step in range(config.trainer.max_steps)]
        return states.have(layers, torch.cat(ids))

    def _hidden_states(self) -> HiddenStates | None:
        """Those of the samples that the run will have read when it is done, in a folder for what they depend on."""
        config, layout = self.run_config, self.groups.layout
        if config.tuning.hidden_cache is None:
            return None
        read = (config.checkpoint, self.corpus.fingerprint, config.data.sequence_length, config.data.document_boundaries)
        key = cache_key(*read, config.seed, config.precision.dtype, config.tuning.hidden_cache_dtype, layout.sequence_parallel)
        length = config.data.sequence_length // (layout.tp if layout.sequence_parallel else 1)
        return HiddenStates(
            expanded(config.tuning.hidden_cache) / key,
            config.tuning.hidden_cache_dtype,
            config.trainer.max_steps * config.data.global_batch_size,
            (length, self.spec.hidden_size),
            self.groups,
        )

    def _build_optimizer(self) -> MegatronOptimizer:
        optimizer = self.run_config.optimizer.model_copy(update={"overlap_grad_reduce": False, "overlap_param_gather": False})
        exits = [exit_.name for exit_ in self.spec.exits]
        return MegatronOptimizer(optimizer, self.run_config.precision, self.chunks.wrapped, self.chunks.config, exits)

    def _flops_per_token(self) -> int:
        return tuning_flops(self.spec, self.run_config.data.sequence_length)

    def head_weights(self, step: int) -> HeadWeights:
        """The final head is frozen: its loss is none that is minimised."""
        weights = super().head_weights(step)
        final = {names.FINAL: 0.0} if self.spec.has_final_head else {}
        return replace(weights, values={**weights.values, **final})
