"""A run becomes a run with other exits: its backbone and tokenizer are what they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from eellm.config.conversion import exits_of
from eellm.config.saved_run import saved_values
from eellm.config.schema import Config, TokenizerConfig
from eellm.convert.exit_edits import edited_tensors
from eellm.convert.resolved import run_spec
from eellm.convert.run_folder import write_run
from eellm.convert.tokenizer_files import copy_run_tokenizer
from eellm.mcore.whole_tensors import read_checkpoint
from eellm.model.spec import ModelSpec
from eellm.rundir import RunDirectory, whole_checkpoint


def edit_model(source: str, target: Path, config: Config, overrides: list[str]) -> ModelSpec:
    """Write `target`, whole or not at all: the run `source` with the exits of `config`. Return the model.

    Raises CheckpointError or ConversionError naming what is not as it should be, WriteError.
    """
    run, checkpoint = whole_checkpoint("convert.source", source)
    after = run_spec(config, run)
    before = replace(after, exits=tuple(exits_of(saved_values(source)["exits"], after.num_layers)))
    tensors = edited_tensors(read_checkpoint(checkpoint), before, after, config.convert.move or {}, config.seed)

    def write_tokenizer(folder: Path) -> TokenizerConfig:
        copy_run_tokenizer(run, folder)
        if config.tokenizer.kind != "file":
            return config.tokenizer
        name = (target / RunDirectory(folder).tokenizer.name).absolute()
        return config.tokenizer.model_copy(update={"path": str(name)})

    write_run(target, config, overrides, tensors, write_tokenizer)
    return after
