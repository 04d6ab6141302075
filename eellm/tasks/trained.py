"""A trained model, read from a run's checkpoint onto the layout of the run that asks."""

from __future__ import annotations

from pathlib import Path

from eellm.config.schema import Config
from eellm.data.tokenizer import Tokenizer
from eellm.data.tokenizer_files import load_tokenizer
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.mcore.checkpoint import load_stages
from eellm.mcore.groups import Groups
from eellm.rundir import RunDirectory, locate, whole_checkpoint
from eellm.tasks.session import Plan


def checkpoint_folder(config: Config) -> Path:
    """The checkpoint that `checkpoint=` names. Raises CheckpointError where there is none that is whole."""
    assert config.checkpoint is not None
    return whole_checkpoint("checkpoint", config.checkpoint)[1]


def trained_tokenizer(config: Config) -> Tokenizer:
    assert config.checkpoint is not None
    return load_tokenizer(locate(config.checkpoint)[0].tokenizer, config.tokenizer.end_of_document)


def with_trained_tokenizer(config: Config) -> Config:
    """The config with the checkpoint's own tokenizer, whatever text is to be read with it."""
    assert config.checkpoint is not None
    return with_tokenizer_of(locate(config.checkpoint)[0], config)


def with_tokenizer_of(run: RunDirectory, config: Config) -> Config:
    """The config with the tokenizer that lies in a run's directory."""
    path = str(run.tokenizer)
    return config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"kind": "file", "path": path})})


def load_trained(config: Config, plan: Plan, groups: Groups) -> Chunks:
    """This rank's stages with the checkpoint's weights, in evaluation mode and without gradient buffers."""
    options = ChunkOptions(config.precision.dtype, seed=None, trainable=False)
    chunks = build_chunks(plan.spec, plan.stages, groups, options)
    load_stages(checkpoint_folder(config), chunks.stages)
    for stage in chunks.stages:
        stage.eval()
    return chunks
