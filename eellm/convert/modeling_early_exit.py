"""A causal language model of `transformers` whose middle layers carry output heads ("exits").

This file needs torch and transformers (4.50 or later, with its safetensors) and nothing else. It travels with a checkpoint:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**inputs, max_new_tokens=64, exit_threshold=0.8)       # tokens leave at the first exit that is 80 % sure
    model.generate(**inputs, max_new_tokens=64, assistant_early_exit=6)   # the exit after layer 6 drafts; nothing is lost
    model(**inputs, output_exit_logits=True).exit_logits[6]               # what the exit after layer 6 says

Without `exit_threshold` the model is its backbone. `config.early_exits` lists the exits; the weights of each are in a file
of its own, which a load without `trust_remote_code` does not read. All options of `generate` work together with
`exit_threshold`, but no beams, `num_return_sequences` or assistants; the rows of a batch are generated one after the other.

How a token exits: after each run of layers between exits the next exit speaks, and where its largest probability reaches the
threshold, its prediction is the model's. The token's hidden state stays behind at that place; the next token that goes deeper
takes it along, so keys and values are those of the model without exits (arXiv 2312.04916, 2402.00518).

Shape legend: b sequences, s tokens, h channels, v vocabulary.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

_NAMES = {"gpt2": ("h", "ln_f"), "gpt_neox": ("layers", "final_layer_norm")}
"""Layers and final norm of a backbone, where they are not called `layers` and `norm`."""

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def exit_file(layer: int) -> str:
    """Where the weights of the exit after `layer` layers are, below the model's folder.

    Not beside `config.json`: there are engines that read all weights that they find there.
    """
    return f"exits/exit_{layer:02d}.safetensors"


class Exit(nn.Module):
    """The head after `layer` layers, made of copies of the backbone's parts.

    `head`: `embedding` is nothing but the output matrix; `norm` a norm before it; `mlp` a residual MLP before the norm;
    `block` a decoder layer, with keys and values of its own, before the norm. The output matrix is the model's if
    `tie_output`. `temperature` divides the logits where they tell how sure the exit is.
    """

    def __init__(self, model: Any, layer: int, head: str, tie_output: bool = True, temperature: float = 1.0):
        super().__init__()
        layers, norm = backbone_parts(model)
        self.layer, self.temperature = layer, temperature
        self.block = copy.deepcopy(layers[-1]) if head == "block" else None
        self.mlp_norm = copy.deepcopy(norm) if head == "mlp" else None
        self.mlp = copy.deepcopy(layers[layer - 1].mlp) if head == "mlp" else None
        self.norm = copy.deepcopy(norm) if head != "embedding" else None
        self.output = None if tie_output else copy.deepcopy(model.get_output_embeddings())

    def forward(self, hidden: torch.Tensor, output: nn.Module) -> torch.Tensor:
        """Hidden states [b, s, h], which have passed the block if there is one, to logits [b, s, v]. `output`: the model's."""
        if self.mlp is not None and self.mlp_norm is not None:
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        if self.norm is not None:
            hidden = self.norm(hidden)
        return (output if self.output is None else self.output)(hidden)


def backbone_parts(model: Any) -> tuple[Any, nn.Module]:
    """The decoder layers and the final norm of a causal language model."""
    layers, norm = _NAMES.get(model.config.model_type, ("layers", "norm"))
    return getattr(model.base_model, layers), getattr(model.base_model, norm)


class _NoPositions(nn.Module):
    """In place of learned positions, where hidden states have them already."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=position_ids.device)


def run_of_layers(model: Any, layers: Sequence[nn.Module], embedded: bool) -> Callable[..., torch.Tensor]:
    """The backbone with some decoder layers and no final norm: takes its arguments, returns hidden states [b, s, h].

    The forward is the backbone's own, so masks, positions, keys and values are its business, and the weights are shared.
    `embedded`: its `inputs_embeds` will be hidden states from between layers.
    """
    layers_name, norm_name = _NAMES.get(model.config.model_type, ("layers", "norm"))
    part = copy.copy(model.base_model)
    part._modules = {**part._modules, layers_name: nn.ModuleList(layers), norm_name: nn.Identity()}
    if embedded and "wpe" in part._modules:
        part._modules["wpe"] = _NoPositions()
    return lambda **inputs: part(**inputs).last_hidden_state


class _LaterCache(DynamicCache):
    """Keys and values of layers that are not the model's first ones."""

    def __init__(self, first: int):
        super().__init__()
        self.first = first

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states, layer_idx - self.first, *args, **kwargs)


class _Segment:
    """A run of layers with its keys and values, what waits in front of it, and the exit behind it; the last one has none."""

    def __init__(self, model: Any, layers: Sequence[nn.Module], cache: DynamicCache, exit_: Exit | None, embedded: bool = True):
        self.exit: Any = exit_
        self.block: _Segment | None = None
        self._run = run_of_layers(model, layers, embedded) if layers else None
        self._options = {"use_cache": True, model.cache_argument: cache}
        self._waiting: list[torch.Tensor] = []
        if exit_ is not None and exit_.block is not None:
            last = len(backbone_parts(model)[0]) - 1  # what a block takes itself for: it is a copy of the last layer
            self.block = _Segment(model, [exit_.block], _LaterCache(last), None)

    def put(self, hidden: torch.Tensor) -> None:
        self._waiting.append(hidden)

    def advance(self) -> torch.Tensor:
        """Take all that wait through the layers: [1, s, h]."""
        hidden, self._waiting = torch.cat(self._waiting, dim=1), []
        return hidden if self._run is None else self._run(inputs_embeds=hidden, **self._options)


class EarlyExitCache(DynamicCache):
    """How far every token of one sequence has got. To `generate` it is the cache of the layers in front of the first exit.

    `exit_layers`: after how many layers each token so far was said.
    """

    def __init__(self, model: Any, threshold: float, exit_layers: Sequence[int] | None = None):
        super().__init__()
        self.threshold = threshold
        self.exit_layers: list[int] = []
        there = [exit_.layer for exit_ in model.early_exits]
        asked = there if exit_layers is None else sorted(set(exit_layers))
        if not set(asked) <= set(there):
            raise ValueError(f"exit_layers={asked}: the model has exits after layers {there}")
        layers = backbone_parts(model)[0]
        bounds = [0, *asked, len(layers)]
        self.segments = [
            _Segment(
                model,
                list(layers[first:last]),
                _LaterCache(first) if first else self,
                model.early_exit(last) if index < len(asked) else None,
                embedded=first > 0,
            )
            for index, (first, last) in enumerate(pairwise(bounds))
        ]


_Backbone: Any = object
"""A model's other base class, known when it is loaded: `LlamaForCausalLM`, .."""


class EarlyExitForCausalLM(_Backbone):
    """What `auto_map` names: a model that it loads is of the backbone's class and of this one."""

    _auto_class = "AutoModelForCausalLM"
    cache_argument = "past_key_values"
    """What the backbone calls keys and values: in newer versions of transformers it is `cache`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self._add_exits()

    def _add_exits(self) -> None:
        options = sorted(self.config.early_exits, key=lambda exit_: exit_["layer"])
        self.exits = nn.ModuleDict({str(exit_["layer"]): Exit(self, **exit_) for exit_ in options})

    @property
    def early_exits(self) -> list[Any]:
        """In order of depth."""
        return list(self.exits.values())

    def early_exit(self, layer: int) -> Any:
        """The one after `layer` layers."""
        return self.exits[str(layer)]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Called by transformers; there is nothing to tell."""

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if not issubclass(cls, PreTrainedModel):
            return with_exits(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As every model's. The backbone loads as it would alone, the names in its files translated; then it gets its exits."""
        config = AutoConfig.from_pretrained(name) if config is None else config
        backbone: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        loaded = backbone.from_pretrained(name, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.__class__ = with_exits(backbone)
        model._add_exits()
        hub = {option: kwargs[option] for option in _HUB_OPTIONS if option in kwargs}
        for exit_ in model.early_exits:
            path: Any = cached_file(name, exit_file(exit_.layer), **hub)
            exit_.load_state_dict(load_file(path))
        return loaded

    def save_pretrained(self, save_directory: Any, state_dict: dict | None = None, **kwargs: Any) -> None:
        """As every model's; each exit goes into its file."""
        state = self.state_dict() if state_dict is None else state_dict
        backbone = {name: tensor for name, tensor in state.items() if not name.startswith("exits.")}
        super().save_pretrained(save_directory, state_dict=backbone, **kwargs)
        for exit_ in self.early_exits:
            prefix, path = f"exits.{exit_.layer}.", os.path.join(save_directory, exit_file(exit_.layer))
            own = {name[len(prefix) :]: tensor.contiguous() for name, tensor in state.items() if name.startswith(prefix)}
            os.makedirs(os.path.dirname(path), exist_ok=True)
            save_file(own, path, metadata={"format": "pt"})

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        exit_threshold: float | None = None,
        exit_layers: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; with `exit_threshold`, tokens leave at the first exit that gives one that probability.

        `exit_layers`: the exits that are asked; None: all. A sequence's first token is always the final head's. With
        `return_dict_in_generate` the result's `exit_layers` tell after how many layers each new token was said.
        """
        settings = self.generation_config if generation_config is None else generation_config
        drafting = kwargs.get("assistant_early_exit", getattr(settings, "assistant_early_exit", None))
        self._check_draft(drafting)
        if exit_threshold is None:
            if exit_layers is not None:
                raise ValueError("exit_layers says which exits are asked; exit_threshold must say how sure they have to be")
            return super().generate(inputs, generation_config, **kwargs)
        tokens, mask = kwargs.pop("input_ids", inputs), kwargs.pop("attention_mask", None)
        if tokens is None or drafting is not None:
            raise ValueError("exit_threshold is for input_ids and without assistant_early_exit")
        mask = torch.ones_like(tokens) if mask is None else mask
        results = []
        for row, present in zip(tokens, mask.bool(), strict=True):
            cache = EarlyExitCache(self, exit_threshold, exit_layers)
            results.append(self._generate_row(row, present, cache, generation_config, **kwargs))
        if len(results) == 1:
            return results[0]
        if not all(isinstance(result, torch.Tensor) for result in results):
            raise ValueError("return_dict_in_generate with exit_threshold is for one sequence")
        padding = kwargs.get("pad_token_id", settings.pad_token_id) or 0
        return nn.utils.rnn.pad_sequence([result[0] for result in results], batch_first=True, padding_value=padding)

    def _generate_row(
        self, row: torch.Tensor, present: torch.Tensor, cache: EarlyExitCache, generation_config: Any, **kwargs: Any
    ) -> Any:
        """One prompt [s], of which the tokens that are no padding are `present` [s]."""
        prompt = row[present].unsqueeze(0)
        kwargs |= {self.cache_argument: cache, "attention_mask": torch.ones_like(prompt)}
        result = super().generate(prompt, generation_config, **kwargs)
        new = (result if isinstance(result, torch.Tensor) else result.sequences)[0, prompt.shape[1] :]
        whole = torch.cat((row.to(new.device), new)).unsqueeze(0)
        if isinstance(result, torch.Tensor):
            return whole
        result["sequences"], result["exit_layers"] = whole, cache.exit_layers[: len(new)]
        return result

    def _check_draft(self, layer: int | None) -> None:
        """Before transformers changes the config for its drafts, which it would leave changed."""
        if layer is None:
            return
        drafts = [exit_.layer for exit_ in self.early_exits if exit_.block is None]
        if layer not in drafts:
            raise ValueError(f"assistant_early_exit={layer}: exits that can draft (have no block) are after layers {drafts}")

    def _forward(self, forward: Callable, *args: Any, output_exit_logits: bool = False, **kwargs: Any) -> Any:
        """The forward of the class, with that of the backbone."""
        inputs = inspect.signature(forward).bind(self, *args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        del inputs["self"]
        cache = inputs.get(self.cache_argument)
        if isinstance(cache, EarlyExitCache):
            return self._step(inputs["input_ids"], cache)
        layers = backbone_parts(self)[0]
        depth = self.base_model.config.num_hidden_layers
        if depth < len(layers):  # transformers lowers it while the exit after so many layers drafts
            return self._draft(self.early_exit(depth), **inputs)
        if not output_exit_logits:
            return forward(self, *args, **kwargs)
        if cache is not None and any(exit_.block is not None for exit_ in self.early_exits):
            raise ValueError("output_exit_logits, where an exit has a block, is for whole sequences, without a cache")
        with _Remembering([layers[exit_.layer - 1] for exit_ in self.early_exits]) as outputs:
            result = forward(self, *args, **(kwargs | {"return_dict": True}))
        pairs = zip(self.early_exits, outputs, strict=True)
        result["exit_logits"] = {exit_.layer: self._exit_logits(exit_, hidden, inputs) for exit_, hidden in pairs}
        return result

    def _exit_logits(self, exit_: Exit, hidden: torch.Tensor, inputs: dict) -> torch.Tensor:
        """What an exit says about whole sequences [b, s, h]: [b, s, v]."""
        if exit_.block is not None:
            given = {name: inputs.get(name) for name in ("attention_mask", "position_ids")}
            run = run_of_layers(self, [exit_.block], embedded=True)
            hidden = run(inputs_embeds=hidden, use_cache=False, **given)
        return exit_(_kept(hidden, inputs.get("logits_to_keep", 0)), self.get_output_embeddings())

    def _draft(self, exit_: Exit, logits_to_keep: int | torch.Tensor = 0, labels: Any = None, **inputs: Any) -> Any:
        """An exit speaks for the model."""
        run = run_of_layers(self, list(backbone_parts(self)[0][: exit_.layer]), embedded=False)
        logits = exit_(_kept(run(**inputs), logits_to_keep), self.get_output_embeddings())
        return self._output(logits, inputs.get(self.cache_argument))

    def _step(self, input_ids: torch.Tensor, cache: EarlyExitCache) -> Any:
        """Logits [1, 1, v] of the next token: after a prompt the final head's, after a token those of the exit where it left."""
        prompt = cache.get_seq_length() == 0
        if input_ids.shape[0] != 1 or (input_ids.shape[1] != 1 and not prompt):
            raise ValueError("exit_threshold is for one sequence and one token at a time: no beams, no assistant")
        output = self.get_output_embeddings()
        cache.segments[0].put(self.get_input_embeddings()(input_ids))
        for segment, following in pairwise(cache.segments):
            hidden = segment.advance()
            following.put(hidden)
            if segment.block is not None:  # which must have seen every token
                segment.block.put(hidden)
                hidden = segment.block.advance()
            if prompt:
                continue
            logits = segment.exit(hidden[:, -1:], output)
            if (logits.float() / segment.exit.temperature).softmax(-1).max() >= cache.threshold:
                return self._said(segment.exit.layer, logits, cache)
        layers, norm = backbone_parts(self)
        return self._said(len(layers), output(norm(cache.segments[-1].advance()[:, -1:])), cache)

    def _said(self, layer: int, logits: torch.Tensor, cache: EarlyExitCache) -> Any:
        cache.exit_layers.append(layer)
        return self._output(logits, cache)

    def _output(self, logits: torch.Tensor, cache: Any) -> Any:
        keys_and_values: dict[str, Any] = {self.cache_argument: cache}
        return CausalLMOutputWithPast(logits=logits, **keys_and_values)


@functools.cache
def with_exits(backbone: Any) -> Any:
    """A backbone's class with exits. Its forward has the backbone's signature, which `generate` looks at."""

    @functools.wraps(backbone.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward(backbone.forward, *args, **kwargs)

    members = {"__module__": __name__, "forward": forward}
    if "cache" in inspect.signature(backbone.forward).parameters:
        members["cache_argument"] = "cache"
    name = EarlyExitForCausalLM.__name__  # `save_pretrained` writes it into `auto_map`
    return type(name, (EarlyExitForCausalLM, backbone), members)


def _kept(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states [b, s, h] whose logits are wanted: the last ones, or those at some places; 0 = all."""
    return hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


class _Remembering:
    """Within it the outputs of modules [b, s, h] are kept, in the modules' order."""

    def __init__(self, modules: Sequence[nn.Module]):
        self._outputs: list[Any] = [None] * len(modules)
        hooks = enumerate(modules)
        self._hooks = [module.register_forward_hook(functools.partial(self._keep, index)) for index, module in hooks]

    def _keep(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        self._outputs[index] = output[0] if isinstance(output, tuple) else output  # tuples up to transformers 4

    def __enter__(self) -> list[torch.Tensor]:
        return self._outputs

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
