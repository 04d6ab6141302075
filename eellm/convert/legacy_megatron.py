"""EE-LLM's own checkpoints as a source: Llama's family, with exits of kind `embedding` and `norm`.

Its other exits compute something that ours do not: the MLP reads the state before its layer's own MLP, the block has never
seen a position. Unverified against files of EE-LLM: see `eellm.convert.legacy_files`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eellm.convert.exit_fields import exit_fields, exit_prefix
from eellm.convert.legacy_files import flat, rank_files, read_rank
from eellm.convert.tokenizer_files import copy_tokenizer
from eellm.errors import ConversionError
from eellm.mcore.whole_tensors import LazyTensor
from eellm.model.spec import ExitSpec

_WANTED = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "apply_layernorm_1p": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "use_exit_mlp": (False,),
    "use_exit_block": (False,),
}
"""Arguments of Megatron-LM, and the values under which its model is one of Llama's family with exits that ours compute."""

_LAYER = re.compile(r"language_model\.(?:encoder|transformer)\.layers\.(\d+)\.(.+)")
_NORMS = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
_NORMS |= {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm"}
_FINAL = ("language_model.encoder.final_norm.weight", "language_model.encoder.final_layernorm.weight")
_IGNORED = re.compile(r".*(_extra_state|rotary_pos_emb\..*|inv_freq)|word_embeddings_for_head\..*")


@dataclass(frozen=True)
class LegacyMegatron:
    """`path` is what the user names, `folder` holds the ranks."""

    path: Path
    folder: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @cached_property
    def _stages(self) -> list[list[dict[str, Any]]]:
        """By pipeline rank what its tensor-parallel ranks have saved."""
        return [[read_rank(file) for file in files] for files in rank_files(self.folder)]

    @cached_property
    def _parts(self) -> list[list[dict[str, torch.Tensor]]]:
        """By pipeline rank and tensor-parallel rank its tensors by name."""
        return [[flat(saved["model"]) for saved in ranks] for ranks in self._stages]

    @cached_property
    def _args(self) -> dict[str, Any]:
        saved = self._stages[0][0].get("args")
        args = vars(saved) if isinstance(saved, argparse.Namespace) else {}
        if "num_layers" not in args:
            raise ConversionError(f"{self.name} does not say what model it is: looked for the arguments of Megatron-LM in it.")
        return args

    def config(self) -> dict[str, Any]:
        args = self._args
        for key, values in _WANTED.items():
            if key in args and args[key] not in values:
                raise ConversionError(f"{self.name}: {key}={args[key]!r} cannot be converted, only {values[0]!r}.")
        groups = args.get("num_query_groups") if args.get("group_query_attention") else args["num_attention_heads"]
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": args["padded_vocab_size"],
            "hidden_size": args["hidden_size"],
            "intermediate_size": args["ffn_hidden_size"],
            "num_hidden_layers": args["num_layers"],
            "num_attention_heads": args["num_attention_heads"],
            "num_key_value_heads": groups,
            "head_dim": args.get("kv_channels") or args["hidden_size"] // args["num_attention_heads"],
            "max_position_embeddings": args.get("max_position_embeddings") or args["seq_length"],
            "rms_norm_eps": args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
            "hidden_act": "silu",
            "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights", False),
            **exit_fields([exit_ for exit_, _, _ in self._exits()]),
        }

    def tensors(self) -> Mapping[str, LazyTensor]:
        found: dict[str, LazyTensor] = {}
        for stage in range(len(self._stages)):
            for name in self._parts[stage][0]:
                found |= dict(self._backbone(stage, name))
        return found

    def exit_tensors(self, exits: Sequence[ExitSpec]) -> Mapping[str, LazyTensor]:
        found = {}
        for exit_, stage, place in self._exits():
            if exit_.head == "norm":
                name = f"language_model.encoder.layers.{place}.exit_norm.weight"
                found[f"{exit_prefix(exit_)}norm.weight"] = self._joined(stage, name, None)
            if not exit_.tie_output:
                number = [other for other, at, _ in self._exits() if at == stage].index(exit_)
                name = f"language_model.exit_output_layer.{number}.weight"
                found[f"{exit_prefix(exit_)}output.weight"] = self._joined(stage, name, 0)
        return found

    def write_tokenizer(self, folder: Path) -> str | None:
        return copy_tokenizer(self.path, folder, {})

    def _exits(self) -> list[tuple[ExitSpec, int, int]]:
        """Exits with their stage and the layer of that stage that carries them; `pre_exit` reads the layer's input."""
        args = self._args
        per_stage, head = args["num_layers"] // len(self._stages), "norm" if args.get("use_exit_norm") else "embedding"
        tied = not args.get("untie_exit_output_weights", False)
        temperatures = args.get("exit_layer_temperature") or [1.0] * len(args.get("exit_layer_nums") or [])
        return [
            (
                ExitSpec(layer - bool(args.get("pre_exit")), head, tied, float(temperature)),
                (layer - 1) // per_stage,
                (layer - 1) % per_stage,
            )
            for layer, temperature in sorted(zip(args.get("exit_layer_nums") or [], temperatures, strict=True))
        ]

    def _joined(self, stage: int, name: str, dim: int | None, halves: int = 1, half: int = 0) -> LazyTensor:
        """A tensor of all tensor-parallel ranks, cut along `dim`; of those that hold a part of two halves, one half."""
        parts = [part.get(name) for part in self._parts[stage]]
        if any(part is None for part in parts):
            raise ConversionError(f"{self.name}: stage {stage} lacks {name}.")
        pieces = [
            part if dim is None else part.unflatten(dim, (halves, -1)).select(dim, half) for part in parts if part is not None
        ]
        shape = list(pieces[0].shape)
        if dim is not None:
            shape[dim] *= len(pieces)

        def read() -> torch.Tensor:
            return (pieces[0] if dim is None else torch.cat(pieces, dim)).clone()

        return LazyTensor(tuple(shape), pieces[0].dtype, read)

    def _backbone(self, stage: int, name: str) -> Iterator[tuple[str, LazyTensor]]:
        """What a tensor of a stage is called in Llama's family; nothing for what belongs to exits."""
        last, first = stage == len(self._stages) - 1, stage == 0
        if name == "language_model.embedding.word_embeddings.weight" and first:
            yield "model.embed_tokens.weight", self._joined(stage, name, 0)
        elif name == "language_model.output_layer.weight" and last:
            yield "lm_head.weight", self._joined(stage, name, 0)
        elif name in _FINAL and last:
            yield "model.norm.weight", self._joined(stage, name, None)
        elif (match := _LAYER.fullmatch(name)) is not None:
            if not match[2].startswith("exit_"):
                layer = int(match[1]) + stage * (self._args["num_layers"] // len(self._stages))
                yield from self._of_a_layer(stage, name, f"model.layers.{layer}.", match[2])
        elif not (name.startswith("language_model.exit_output_layer.") or _IGNORED.fullmatch(name)):
            raise ConversionError(f"{self.name}: stage {stage} holds {name}, which is no part of the model that it describes.")

    def _of_a_layer(self, stage: int, name: str, prefix: str, part: str) -> Iterator[tuple[str, LazyTensor]]:
        module = part.removesuffix(".weight")
        if module in _NORMS:
            yield f"{prefix}{_NORMS[module]}.weight", self._joined(stage, name, None)
        elif module == "self_attention.dense":
            yield f"{prefix}self_attn.o_proj.weight", self._joined(stage, name, 1)
        elif module == "mlp.dense_4h_to_h":
            yield f"{prefix}mlp.down_proj.weight", self._joined(stage, name, 1)
        elif module == "mlp.dense_h_to_4h":
            yield f"{prefix}mlp.gate_proj.weight", self._joined(stage, name, 0, 2, 0)
            yield f"{prefix}mlp.up_proj.weight", self._joined(stage, name, 0, 2, 1)
        elif module == "self_attention.query_key_value":
            yield from self._attention_inputs(self._joined(stage, name, 0), prefix)
        elif not _IGNORED.fullmatch(part):
            raise ConversionError(f"{self.name}: stage {stage} holds {name}, which Llama's family has not.")

    def _attention_inputs(self, mixed: LazyTensor, prefix: str) -> Iterator[tuple[str, LazyTensor]]:
        """Group by group its queries, its key and its value."""
        config = self.config()
        groups, width = config["num_key_value_heads"], config["head_dim"]
        queries = config["num_attention_heads"] // groups
        if mixed.shape[0] != groups * (queries + 2) * width:
            raise ConversionError(f"{self.name}: {prefix}self_attn has {mixed.shape[0]} rows of queries, keys and values.")
        for part, begin, end in (("q", 0, queries), ("k", queries, queries + 1), ("v", queries + 1, queries + 2)):

            def read(begin: int = begin, end: int = end) -> torch.Tensor:
                return mixed.read().unflatten(0, (groups, queries + 2, width))[:, begin:end].flatten(0, 2).contiguous()

            yield (
                f"{prefix}self_attn.{part}_proj.weight",
                LazyTensor((groups * (end - begin) * width, mixed.shape[1]), mixed.dtype, read),
            )
