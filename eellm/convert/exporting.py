"""A run becomes a folder of `transformers`: its backbone loads with plain AutoModelForCausalLM, its exits with their own code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from eellm.config.schema import Config
from eellm.convert.exit_files import export_exits
from eellm.convert.families import Family, family_of
from eellm.convert.ledger import Ledger
from eellm.convert.resolved import resolved_model, run_spec
from eellm.convert.safetensors_files import Announced, TensorWriter
from eellm.convert.tokenizer_files import CONFIG, copy_run_tokenizer, read_config
from eellm.convert.weights import EXIT, Link, links
from eellm.data.cache import new_folder, write_atomically
from eellm.data.tokenizer import Tokenizer
from eellm.data.tokenizer_files import load_tokenizer
from eellm.errors import ConversionError
from eellm.mcore.whole_tensors import LazyTensor, read_checkpoint
from eellm.model.shapes import parameter_shapes
from eellm.model.spec import ModelSpec
from eellm.rundir import RunDirectory, whole_checkpoint

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def export_model(source: str, target: Path, config: Config) -> ModelSpec:
    """Write `target`, whole or not at all; return the model.

    Raises CheckpointError or ConversionError naming what is not as it should be, WriteError.
    """
    run, checkpoint = whole_checkpoint("convert.source", source)
    spec = run_spec(config, run)
    tensors = read_checkpoint(checkpoint)
    backbone = {name: tensor for name, tensor in tensors.items() if not name.startswith(EXIT)}
    with new_folder(target) as folder:
        write_backbone(folder, backbone, config, spec, run)
        export_exits(folder, spec, {name: tensor for name, tensor in tensors.items() if name not in backbone})
    return spec


def write_backbone(folder: Path, tensors: Mapping[str, LazyTensor], config: Config, spec: ModelSpec, run: RunDirectory) -> None:
    """config.json, weights, tokenizer and what lies beside it; `tensors` are the backbone's and nothing else's."""
    model = resolved_model(config.model, spec.vocab_size, spec.max_positions)
    family, lost = family_of(model)
    assert not lost, "checked with the config"
    tokenizer = copy_tokenizer(run, folder, config.tokenizer.end_of_document)
    described = family.write(model) | token_ids(folder, tokenizer)
    dtype = tensors["embedding.tokens.weight"].dtype if "embedding.tokens.weight" in tensors else torch.float32
    described |= {"torch_dtype": _DTYPES.get(dtype, "float32"), "use_cache": True}
    write_atomically(folder / "config.json", json.dumps(described, indent=2) + "\n")
    write_weights(folder, tensors, family, spec, int(config.convert.shard_gigabytes * 1e9))


def write_weights(folder: Path, tensors: Mapping[str, LazyTensor], family: Family, spec: ModelSpec, shard_bytes: int) -> None:
    """The backbone's weights under the family's names. Raises ConversionError unless each is used once."""
    wanted = {name: shape for name, shape in parameter_shapes(spec).items() if not name.startswith(EXIT)}
    ledger = Ledger(tensors, "the checkpoint")
    taken = [(link, ledger.take(link.ours, link.shape)) for link in links(family, spec)]
    for link, tensor in taken:
        ledger.make(link.ours, tensor)
    ledger.settle(wanted)
    announced: dict[str, Announced] = {}
    for link, tensor in taken:
        for name, shape in zip(link.theirs, link.shapes, strict=True):
            if name in announced:
                raise ConversionError(f"{name} would be written twice.")
            announced[name] = (shape, tensor.dtype)
    TensorWriter(folder, announced, shard_bytes).write(_split(taken))


def _split(taken: list[tuple[Link, LazyTensor]]) -> Iterator[torch.Tensor]:
    for link, tensor in taken:
        yield from link.split(tensor.read())


def copy_tokenizer(run: RunDirectory, folder: Path, end_of_document: str | None) -> Tokenizer | None:
    """The run's tokenizer with its companions; where it has no tokenizer_config.json, one that `transformers` understands."""
    if not run.tokenizer.is_file():
        return None
    tokenizer = load_tokenizer(run.tokenizer, end_of_document)
    copy_run_tokenizer(run, folder)
    if not (folder / CONFIG).exists():
        end = next((token for token, id_ in tokenizer.special_tokens.items() if id_ == tokenizer.eod_id), None)
        kind = "LlamaTokenizer" if tokenizer.suffix == ".model" else "PreTrainedTokenizerFast"
        own = {"tokenizer_class": kind, "clean_up_tokenization_spaces": False} | ({} if end is None else {"eos_token": end})
        write_atomically(folder / CONFIG, json.dumps(own, indent=2, ensure_ascii=False) + "\n")
    return tokenizer


def token_ids(folder: Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """bos, eos and pad ids of config.json; null where there is no such token, since their defaults are other models'."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    named = read_config(folder / CONFIG)
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    ids = {f"{key}_token_id": tokenizer.special_tokens.get(str(texts.get(f"{key}_token"))) for key in ("bos", "pad")}
    return {**ids, "eos_token_id": tokenizer.eod_id}
