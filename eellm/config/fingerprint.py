"""Which runs are the same: hashes of those values that determine what comes out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from eellm.config.schema import Config
from eellm.reference import NAME, reference_run

_NOT_TRAINED: dict[str, tuple[str, ...]] = {
    "data": ("micro_batch_size", "cache_dir", "num_workers"),
    "optimizer": ("distributed", "overlap_grad_reduce", "overlap_param_gather"),
    "model": ("attention",),
    "exits": ("boundary", "deferred"),
}
"""Keys of the groups of which weights are made that leave the weights as they are."""

_NO_RESULT: dict[str, tuple[str, ...]] = {
    "data": ("cache_dir", "num_workers"),
    "trainer": ("progress", "checkpoint_every", "keep_checkpoints", "checkpoint_async"),
    "debug": ("detect_anomaly", "profile", "timeline"),
}
"""Keys that change neither what a run computes nor what it measures: where text is cached and by how many processes it is
read, what is shown, how often a state to go on from is saved, what is looked at more closely."""

_NO_RESULT_GROUPS = ("name", "study", "resume", "objective", "logger")
"""Where a run writes, whether it has been interrupted, which of its metrics a sweeper is told, their mirrors."""


def weights_fingerprint(config: Config) -> str:
    """Hash of what determines the trained weights, whatever the layout, the machine or the logging.

    Counts: seed, model, exits, loss weights, data (but micro-batch size, cache and loaders), tokenizer, optimizer (but how
    its states and communication are split), learning-rate schedule with its end, dtype, overfitting, and the checkpoint
    whose weights it begins with. Two runs with equal
    fingerprints see the same batches and take the same steps, as far as both go.
    """
    dump = _without(config.model_dump(), _NOT_TRAINED)
    dump["lr_schedule"]["decay_steps"] = config.lr_schedule.decay_steps or config.trainer.max_steps
    groups = ("seed", "model", "exits", "loss_weights", "data", "tokenizer", "optimizer", "lr_schedule")
    counted = {**{group: dump[group] for group in groups}, "dtype": config.precision.dtype, "overfit": config.debug.overfit}
    if config.task.name == "tune":
        counted["tuning"] = dump["tuning"]
    if config.checkpoint is not None:
        counted["checkpoint"] = _wherever_it_is(config.checkpoint)
    return _hash(counted)


def run_fingerprint(config: Config) -> str:
    """Hash of what determines a run's result: every value but `_NO_RESULT` and `_NO_RESULT_GROUPS`.

    Layout, schedule, device and precision count, since they are what benchmarks and plans are about. The program's own
    version and the contents of files do not: what was done by an older version, or with a checkpoint of the same path,
    counts as done.
    """
    dump = _without(config.model_dump(exclude=set(_NO_RESULT_GROUPS)), _NO_RESULT)
    if config.checkpoint is not None:
        dump["checkpoint"] = _wherever_it_is(config.checkpoint)
    return _hash(dump)


def _without(dump: dict[str, Any], keys: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    for group, names in keys.items():
        for name in names:
            del dump[group][name]
    return dump


def _wherever_it_is(checkpoint: str) -> str:
    """A checkpoint by its absolute path; the one that comes with eellm by its name, wherever that is installed."""
    path, own = Path(checkpoint).expanduser().absolute(), reference_run()
    return str(Path(NAME) / path.relative_to(own)) if path.is_relative_to(own) else str(path)


def _hash(counted: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(counted, sort_keys=True).encode(), digest_size=8).hexdigest()
