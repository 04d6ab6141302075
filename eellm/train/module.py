"""The Lightning module: one step = zero, run the engine, update; validation of every head; what is logged."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule

from eellm.config.schema import Config
from eellm.data.batch import GlobalBatch
from eellm.data.batches import loaders
from eellm.data.corpus import Corpus
from eellm.device_clock import wait_for
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.engine.protocol import Losses, TrainingEngine
from eellm.engine.schedules import training_engine
from eellm.mcore.data_parallel import ReductionOptions
from eellm.mcore.groups import Groups
from eellm.mcore.optimizer import MegatronOptimizer, StepResult
from eellm.metrics import names
from eellm.metrics.flops import training_flops
from eellm.metrics.recorder import Recorder
from eellm.metrics.speed import Speedometer, peak_memory_gb
from eellm.model.objective import HeadWeights, ObjectiveOptions, head_weights
from eellm.model.spec import ModelSpec, StageSpec
from eellm.plan.iteration import with_ratio
from eellm.train.lr_schedule import learning_rate
from eellm.train.nonfinite import NonFiniteSteps


class OptimizerAdapter(torch.optim.Optimizer):
    """What Lightning needs to see of megatron-core's optimizer; the module holds the result of the last step."""

    def __init__(self, optimizer: MegatronOptimizer):
        self.optimizer, self.defaults = optimizer, {}
        self.last: StepResult | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        return {}

    def step(self, closure: Any = None, update: bool = True) -> Any:  # type: ignore[override]
        """Without `update` the step counts as one and changes nothing: its losses are not finite."""
        loss = closure() if closure is not None else None
        self.last = self.optimizer.step() if update else StepResult("nonfinite", math.nan)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {}  # saved as sharded tensors by the strategy


class EarlyExitModule(LightningModule):
    """Trains all heads of the stages that this rank holds. Every number it logs is the same on all ranks."""

    def __init__(
        self, config: Config, spec: ModelSpec, plan: list[StageSpec], groups: Groups, corpus: Corpus, recorder: Recorder
    ):
        super().__init__()
        self.automatic_optimization = False
        self.run_config, self.spec, self.plan, self.groups = config, spec, plan, groups
        self.corpus, self.recorder = corpus, recorder
        self.consumed_samples = 0
        self.chunks = self._build_chunks()
        self.engine = self._build_engine()
        self.megatron_optimizer = self._build_optimizer()
        self.engine.grad_scale = self.megatron_optimizer.loss_scale
        self.latest: dict[str, float] = {}
        """The last logged value of every metric, for progress displays and the final summary."""
        self._validation: dict[str, float] = defaultdict(float)
        self.nonfinite = NonFiniteSteps(config.trainer.max_nonfinite_steps, plan)
        self.speed = Speedometer(
            flops_per_token=self._flops_per_token(),
            world_size=groups.layout.world_size,
            synchronise=partial(wait_for, groups.device),
        )

    def _build_chunks(self) -> Chunks:
        config, optimizer = self.run_config, self.run_config.optimizer
        reduction = ReductionOptions(optimizer.distributed, optimizer.overlap_grad_reduce, optimizer.overlap_param_gather)
        options = ChunkOptions(config.precision.dtype, config.seed, config.trainer.recompute, reduction)
        return build_chunks(self.spec, self.plan, self.groups, options)

    def _build_engine(self) -> TrainingEngine:
        config = self.run_config
        options = ObjectiveOptions(config.exits.deferred, config.trainer.loss_chunk)
        return training_engine(with_ratio(config, self.spec.vocab_size), self.chunks, options)

    def _build_optimizer(self) -> MegatronOptimizer:
        config = self.run_config
        return MegatronOptimizer(config.optimizer, config.precision, self.chunks.wrapped, self.chunks.config)

    def _flops_per_token(self) -> int:
        return training_flops(self.spec, self.run_config.data.sequence_length)

    def configure_optimizers(self) -> OptimizerAdapter:
        return OptimizerAdapter(self.megatron_optimizer)

    def train_dataloader(self) -> Any:
        """Built after a checkpoint is restored, so it begins at the first sample that was not consumed."""
        return self._loaders()[0]

    def val_dataloader(self) -> Any:
        return self._loaders()[1]

    def _loaders(self) -> Any:
        return loaders(self.run_config, self.corpus, self.groups.layout, self.groups.dp_rank, self.consumed_samples)

    def head_weights(self, step: int) -> HeadWeights:
        """Loss weights of the optimizer step `step` (0-based)."""
        return head_weights(self.run_config.loss_weights, self.spec, step)

    def on_train_start(self) -> None:
        self.speed.restart()

    def training_step(self, batch: GlobalBatch, batch_idx: int) -> None:
        config, step = self.run_config, self.trainer.global_step
        weights = self.head_weights(step)
        lr = learning_rate(config.lr_schedule, config.optimizer.lr, step, config.trainer.max_steps)
        self.megatron_optimizer.set_lr(lr)
        self.chunks.zero_grad()
        self.megatron_optimizer.zero_grad()
        losses = self.engine.run(batch, weights)
        self.optimizers().step(update=all(math.isfinite(mean) for mean in losses.means.values()))
        if self.optimizers().optimizer.last.outcome == "nonfinite":
            self.nonfinite.skip(step + 1, losses.means, self.chunks.stages)
        samples = batch.num_sequences * self.groups.layout.dp
        self.consumed_samples += samples
        self.speed.step(samples * config.data.sequence_length)
        if (step + 1) % config.trainer.log_every == 0:
            self._log_step(losses, weights, {names.LEARNING_RATE: lr, names.BATCH_SIZE: samples})

    def _log_step(self, losses: Losses, weights: HeadWeights, scheduled: dict[str, float]) -> None:
        """`scheduled`: what the step was given, apart from the loss weights."""
        result = self.optimizers().optimizer.last
        metrics = {names.train_loss(head): mean for head, mean in losses.means.items()}
        metrics[names.TRAIN_LOSS_TOTAL] = losses.total(weights)
        metrics |= {names.train_weight(exit_.name): weights.values[exit_.name] for exit_ in self.spec.exits}
        metrics |= {names.GRAD_NORM: result.grad_norm, **scheduled}
        if self.run_config.precision.dtype == "fp16":
            metrics[names.LOSS_SCALE] = self.megatron_optimizer.loss_scale()
        if self.nonfinite.allowed:
            metrics[names.NONFINITE_STEPS] = self.nonfinite.skipped
        metrics |= self.speed.lap()
        metrics |= self._memory_by_stage()
        self._record(metrics)

    def _memory_by_stage(self) -> dict[str, float]:
        """Peak memory of the hungriest rank of every pipeline stage, on all ranks."""
        layout = self.groups.layout
        peaks = torch.zeros(layout.pp, device=self.groups.device)
        peaks[self.groups.pp_rank] = peak_memory_gb(self.groups.device.type)
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        return {names.memory_gb(stage): peak for stage, peak in enumerate(peaks.tolist())}

    def _record(self, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        self.recorder.log(self.trainer.global_step, metrics)
        self.log_dict(metrics, logger=False)  # for callbacks that monitor one

    def on_validation_start(self) -> None:
        self._pause = contextlib.ExitStack()
        self._pause.enter_context(self.speed.paused())

    def on_validation_end(self) -> None:
        self._pause.close()

    def validation_step(self, batch: GlobalBatch, batch_idx: int) -> None:
        losses = self.engine.run(batch, self.head_weights(self.trainer.global_step), forward_only=True)
        self._validation["tokens"] += losses.num_tokens
        for head, mean in losses.means.items():
            self._validation[head] += mean * losses.num_tokens

    def on_validation_epoch_end(self) -> None:
        tokens = self._validation.pop("tokens", 0.0)
        if tokens:
            self._record({names.val_loss(head): total / tokens for head, total in self._validation.items()})
        self._validation.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["consumed_samples"] = self.consumed_samples
        checkpoint["nonfinite_steps"] = self.nonfinite.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.consumed_samples = checkpoint["consumed_samples"]
        self.nonfinite.skipped = checkpoint.get("nonfinite_steps", 0)
