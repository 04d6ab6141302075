"""What a conversion to eellm writes: a run's directory that `checkpoint=` reads like any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from eellm.config.compose import to_yaml
from eellm.config.fingerprint import weights_fingerprint
from eellm.config.schema import Config, TokenizerConfig
from eellm.data.cache import new_folder
from eellm.mcore.whole_tensors import LazyTensor, write_checkpoint
from eellm.rundir import RunDirectory, step_name


def write_run(
    target: Path,
    config: Config,
    overrides: list[str],
    tensors: Mapping[str, LazyTensor],
    write_tokenizer: Callable[[Path], TokenizerConfig],
) -> None:
    """Write `target`, whole or not at all. `write_tokenizer` puts the tokenizer into a folder and says what it is.

    Raises WriteError, and whatever reading a tensor raises.
    """
    with new_folder(target) as folder:
        run = RunDirectory(folder)
        saved = config.model_copy(update={"tokenizer": write_tokenizer(folder)})
        run.describe(to_yaml(saved), overrides, weights_fingerprint(saved))
        write_checkpoint(run.checkpoints / step_name(0), tensors)
        run.write_status("done")
