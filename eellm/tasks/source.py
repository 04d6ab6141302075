"""The run that `checkpoint=` names: its checkpoint and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from eellm.config.schema import Config
from eellm.data.tokenizer import Tokenizer
from eellm.data.tokenizer_files import load_tokenizer
from eellm.rundir import RunDirectory, locate, whole_checkpoint


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
