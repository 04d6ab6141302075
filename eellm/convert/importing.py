"""A model of another library becomes a run, with the exits that it has or that are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from eellm.config.schema import Config, TokenizerConfig
from eellm.convert.exit_edits import edited_tensors
from eellm.convert.exit_fields import described_exits
from eellm.convert.exit_files import prefixed_links
from eellm.convert.families import Family, family_named
from eellm.convert.ledger import Ledger
from eellm.convert.run_folder import write_run
from eellm.convert.sources import Source
from eellm.convert.weights import Link, links
from eellm.errors import ConversionError
from eellm.mcore.whole_tensors import LazyTensor
from eellm.model.shapes import parameter_shapes
from eellm.model.spec import ModelSpec, build_spec
from eellm.rundir import RunDirectory


def import_model(source: Source, target: Path, config: Config, overrides: list[str]) -> ModelSpec:
    """Write `target`, whole or not at all. `config.model` is the source's, `config.exits` are in place of those that it has.

    Raises ConversionError naming the tensor or file that is not as it should be, WriteError.
    """
    assert config.model.vocab_size is not None, "config.json names the vocabulary's size"
    after = build_spec(config, config.model.vocab_size)
    before = replace(after, exits=tuple(described_exits(source.config())))
    tensors = edited_tensors(imported_tensors(source, before), before, after, config.convert.move or {}, config.seed)

    def write_tokenizer(folder: Path) -> TokenizerConfig:
        end = source.write_tokenizer(folder)
        path = str((target / RunDirectory(folder).tokenizer.name).absolute())
        return config.tokenizer.model_copy(update={"kind": "file", "path": path, "end_of_document": end, "vocab_size": None})

    write_run(target, config, overrides, tensors, write_tokenizer)
    return after


def imported_tensors(source: Source, spec: ModelSpec) -> Mapping[str, LazyTensor]:
    """All parameters of the source's model by global name, in our layout and their type; `spec` has the exits that it has."""
    family = family_named(source.config())
    ledger = Ledger({**_with_prefix(source.tensors(), family), **source.exit_tensors(spec.exits)}, source.name)
    ledger.leave(family.buffers)
    backbone = links(family, spec)
    made = {link.ours: _joined(link, ledger) for link in [*backbone, *prefixed_links(family, spec)]}
    if spec.tie_embeddings:
        _drop_tied_output(made, backbone, family, source, ledger)
    for name, tensor in made.items():
        ledger.make(name, tensor)
    return ledger.settle(parameter_shapes(spec))


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
