"""A small configuration with known values: the default one, and on top of it what the tests here rely on."""

from __future__ import annotations

import copy
import functools
from typing import Any

from eellm.config.compose import compose
from eellm.config.schema import Config

KNOWN: dict[str, Any] = {
    "name": "example",
    "model.num_layers": 8,
    "model.hidden_size": 128,
    "model.num_attention_heads": 4,
    "exits.layers": [2, 4, 6],
    "exits.head": "norm",
    "exits.tie_output": True,
    "loss_weights.values": 0.5,
    "parallel.pp": 2,
    "data.sequence_length": 128,
    "data.micro_batch_size": 4,
    "data.global_batch_size": 16,
    "tokenizer.vocab_size": 2048,
    "logger.csv": True,
    "logger.wandb.mode": "off",
    "logger.wandb.project": "eellm",
    "logger.wandb.tags": ["test"],
}


def example_config(overrides: dict[str, Any] | None = None) -> Config:
    """The values above with dotted overrides, e.g. {"logger.wandb.mode": "offline"}."""
    values = copy.deepcopy(_default_values())
    for path, value in {**KNOWN, **(overrides or {})}.items():
        *parents, last = path.split(".")
        node = values
        for parent in parents:
            node = node[parent]
        node[last] = value
    return Config.model_validate(values)


@functools.cache
def _default_values() -> dict[str, Any]:
    return compose([]).model_dump()
