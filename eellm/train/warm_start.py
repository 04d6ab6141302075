"""Training that begins with the weights of another run: what the model shares is loaded, exits that are new are initialised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eellm.errors import CheckpointError
from eellm.mcore.checkpoint import Shapes, check_shapes, load_checked, model_state, saved_shapes, template_shapes
from eellm.mcore.checkpoint_files import OPTIMIZER
from eellm.model.initialise import source_name
from eellm.model.spec import ModelSpec
from eellm.model.stage import Stage

_EXIT = re.compile(r"heads\.(exit_\d+)\.")
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class WarmStart:
    """What became of the exits, by name: all weights loaded, some, none; nothing to load; those that only the checkpoint has."""

    checkpoint: Path
    init: str
    kept: tuple[str, ...]
    completed: tuple[str, ...]
    added: tuple[str, ...]
    weightless: tuple[str, ...]
    others: tuple[str, ...]
    fate_of_others: str = "dropped"

    def __str__(self) -> str:
        fates = {
            "kept": self.kept,
            f"completed (init={self.init})": self.completed,
            f"added (init={self.init})": self.added,
            "without weights of their own": self.weightless,
            self.fate_of_others: self.others,
        }
        told = "; ".join(f"{fate} {', '.join(exits)}" for fate, exits in fates.items() if exits)
        return f"warm start from {self.checkpoint}, exits: {told or 'none'}"


def warm_start(checkpoint: Path, stages: Sequence[Stage], spec: ModelSpec, fate_of_others: str = "dropped") -> WarmStart:
    """Load the weights of a checkpoint into initialised stages; all ranks call this.

    Weights of exits that the checkpoint lacks stay as initialised, or with `exits.init=copy` are loaded from what they
    are copies of, be it above what the spec builds. Raises CheckpointError where anything else is missing, in excess, or of
    another shape. `fate_of_others` says in a word what becomes of exits that only the checkpoint has.
    """
    there, wanted = saved_shapes(checkpoint), template_shapes(model_state(stages))
    new = [key for key in sorted(wanted) if key not in there and _EXIT.match(key)]
    copies = {key: source_name(spec, key) for key in new} if spec.exit_init == "copy" else {}
    check_shapes(checkpoint, there, {key: shape for key, shape in wanted.items() if key not in new})
    check_shapes(checkpoint, there, {source: wanted[key] for key, source in copies.items()})
    others = {key for key in there if key not in wanted and not key.startswith(OPTIMIZER) and not _EXIT.match(key)}
    foreign = sorted(key for key in others if not is_left_out(spec, key))
    if foreign:
        raise CheckpointError(f"{checkpoint} is of another model: it also has {', '.join(foreign[:4])}.")
    _load(checkpoint, stages, {key: key for key in wanted if key in there})
    for exit_ in sorted(_exits(copies)):  # one at a time: several exits may copy the same tensor
        _load(checkpoint, stages, {key: source for key, source in copies.items() if key.startswith(f"heads.{exit_}.")})
    return replace(_told(checkpoint, spec, there, wanted, new), fate_of_others=fate_of_others)


def is_left_out(spec: ModelSpec, key: str) -> bool:
    """Whether a tensor belongs to what the spec leaves unbuilt of the model: upper layers, final norm and output matrix, and
    of exits alone the embeddings too."""
    if spec.depth is None:
        return False
    if key.startswith("embedding."):
        return spec.depth == 0
    layer = _LAYER.match(key)
    if layer is not None:
        return spec.built_layers < int(layer[1]) <= spec.num_layers
    return key == "output.weight" or key.startswith("heads.final.")


def _told(checkpoint: Path, spec: ModelSpec, there: Shapes, wanted: Shapes, new: Sequence[str]) -> WarmStart:
    saved, weighted, changed = _exits(there), _exits(wanted), _exits(new)
    heads = [exit_.name for exit_ in spec.exits]
    return WarmStart(
        checkpoint=checkpoint,
        init=spec.exit_init,
        kept=tuple(head for head in heads if head in weighted and head not in changed),
        completed=tuple(head for head in heads if head in changed and head in saved),
        added=tuple(head for head in heads if head in changed and head not in saved),
        weightless=tuple(head for head in heads if head not in weighted),
        others=tuple(sorted(saved - set(heads))),
    )


def _exits(keys: Iterable[str]) -> set[str]:
    return {match[1] for match in map(_EXIT.match, keys) if match}


def _load(checkpoint: Path, stages: Sequence[Stage], sources: Mapping[str, str]) -> None:
    """Load each named tensor from the checkpoint's tensor of the mapped name."""
    template = {}
    for stage in stages:
        state = stage.sharded_state_dict()
        template[f"stage_{stage.stage_spec.index}"] = {
            name: replace(tensor, key=sources[tensor.key]) for name, tensor in state.items() if tensor.key in sources
        }
    loaded = load_checked(checkpoint, template)
    for stage in stages:
        stage.load_state_dict(loaded.get(f"stage_{stage.stage_spec.index}", {}), strict=False)
