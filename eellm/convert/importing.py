"""A model of another library becomes a run's directory that `checkpoint=` reads like any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from eellm.config.compose import fingerprint, to_yaml
from eellm.config.schema import Config
from eellm.convert.families import Family, family_named
from eellm.convert.ledger import Ledger
from eellm.convert.sources import Source
from eellm.convert.weights import EXIT, Link, links
from eellm.data.cache import new_folder
from eellm.errors import ConversionError
from eellm.mcore.whole_tensors import LazyTensor, write_checkpoint
from eellm.model.initialise import initial_value, source_name
from eellm.model.shapes import parameter_shapes
from eellm.model.spec import ModelSpec, build_spec
from eellm.rundir import RunDirectory, step_name


def import_model(source: Source, target: Path, config: Config, overrides: list[str]) -> ModelSpec:
    """Write `target`, whole or not at all. `config.model` is the source's, `config.exits` are added.

    Raises ConversionError naming the tensor or file that is not as it should be, WriteError.
    """
    assert config.model.vocab_size is not None, "config.json names the vocabulary's size"
    spec = build_spec(config, config.model.vocab_size)
    tensors = imported_tensors(source, spec, config.seed)
    with new_folder(target) as folder:
        end = source.write_tokenizer(folder)
        run = RunDirectory(folder)
        name = target / run.tokenizer.name
        tokenizer = config.tokenizer.model_copy(
            update={"kind": "file", "path": str(name.absolute()), "end_of_document": end, "vocab_size": None}
        )
        saved = config.model_copy(update={"tokenizer": tokenizer})
        run.describe(to_yaml(saved), overrides, fingerprint(saved))
        write_checkpoint(run.checkpoints / step_name(0), tensors)
        run.write_status("done")
    return spec


def imported_tensors(source: Source, spec: ModelSpec, seed: int) -> Mapping[str, LazyTensor]:
    """All parameters of the model by global name: the source's weights in our layout, in their type, and initialised exits."""
    family = family_named(source.config())
    ledger = Ledger(_with_prefix(source.tensors(), family), source.name)
    ledger.leave(family.buffers)
    backbone = links(family, spec)
    made = {link.ours: _joined(link, ledger) for link in backbone}
    if spec.tie_embeddings:
        _drop_tied_output(made, backbone, family, source, ledger)
    for name, tensor in made.items():
        ledger.make(name, tensor)
    dtype = made["embedding.tokens.weight"].dtype
    shapes = parameter_shapes(spec)
    for name, shape in shapes.items():
        if name.startswith(EXIT):
            origin = source_name(spec, name)
            ledger.make(name, made[origin] if origin in made else _drawn(spec, origin, shape, seed, dtype))
    return ledger.settle(shapes)


def _with_prefix(tensors: Mapping[str, LazyTensor], family: Family) -> Mapping[str, LazyTensor]:
    """Under the names of the whole model, where the file holds those of its body alone (the first GPT-2 files do)."""
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    outside = family.weights["output"].modules[0]
    return {name if name.startswith(outside) else family.prefix + name: tensor for name, tensor in tensors.items()}


def _joined(link: Link, ledger: Ledger) -> LazyTensor:
    theirs = [ledger.take(name, shape) for name, shape in zip(link.theirs, link.shapes, strict=True)]
    types = {tensor.dtype for tensor in theirs}
    if len(types) > 1:
        ledger.fault(f"{', '.join(link.theirs)} are of different types, and one tensor of ours")

    def read() -> torch.Tensor:
        return link.join([tensor.read() for tensor in theirs]).contiguous()

    return LazyTensor(link.shape, theirs[0].dtype, read)


def _drop_tied_output(made: dict[str, LazyTensor], backbone: list[Link], family: Family, source: Source, ledger: Ledger) -> None:
    """Some files hold the output matrix a second time though it is the input embedding: it must be, and is not kept."""
    output = f"{family.weights['output'].modules[0]}.weight"
    if not ledger.holds(output):
        return
    link = next(link for link in backbone if link.ours == "embedding.tokens.weight")
    twin, embedding = ledger.take(output, link.shapes[0]), made[link.ours]

    def read() -> torch.Tensor:
        whole = embedding.read()
        if not torch.equal(whole[: twin.shape[0]], twin.read()):
            reason = f"{output} differs from {link.theirs[0]}, though tie_word_embeddings is true"
            raise ConversionError(f"{source.name} cannot be converted: {reason}.")
        return whole

    made[link.ours] = LazyTensor(embedding.shape, embedding.dtype, read)


def _drawn(spec: ModelSpec, name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda: initial_value(spec, name, shape, seed).to(dtype))
