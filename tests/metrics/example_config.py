"""A small valid configuration as plain data, for tests that need one but not the YAML files."""

from __future__ import annotations

import copy
from typing import Any

from eellm.config.schema import Config

VALUES: dict[str, Any] = {
    "name": "example",
    "seed": 1,
    "device": "cpu",
    "checkpoint": None,
    "resume": None,
    "objective": "val/loss/final",
    "task": {"name": "quickstart"},
    "model": {
        "num_layers": 8,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": None,
        "head_dim": None,
        "ffn_hidden_size": None,
        "activation": "swiglu",
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "norm_placement": "before",
        "residual": "sequential",
        "qk_norm": "none",
        "position": "rotary",
        "rotary_fraction": 1.0,
        "rotary_base": 10000.0,
        "max_positions": None,
        "qkv_bias": False,
        "linear_bias": False,
        "sliding_window": None,
        "attention": "sdpa",
        "tie_embeddings": True,
        "vocab_size": None,
        "vocab_multiple": 64,
        "init_std": 0.02,
    },
    "exits": {
        "layers": [2, 4, 6],
        "head": "norm",
        "tie_output": True,
        "init": "random",
        "temperature": 1.0,
        "boundary": "end",
        "deferred": True,
    },
    "loss_weights": {
        "kind": "constant",
        "values": [0.25, 0.5, 0.75],
        "initial": 0.0,
        "steps": 0,
        "shape": "linear",
        "final": 1.0,
    },
    "parallel": {"tp": 1, "pp": 2, "vp": 1, "dp": 1, "sequence_parallel": False, "layers_per_stage": None},
    "schedule": {"name": "auto"},
    "data": {
        "source": "stdlib",
        "path": None,
        "pattern": "**/*.py",
        "text_field": "text",
        "split": [0.98, 0.02],
        "sequence_length": 128,
        "micro_batch_size": 4,
        "global_batch_size": 16,
        "document_boundaries": "ignore",
        "cache_dir": "cache",
        "num_workers": 0,
    },
    "tokenizer": {"kind": "byte_bpe", "vocab_size": 2048, "path": None, "train_megabytes": 2.0},
    "optimizer": {
        "name": "adam",
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "distributed": False,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
    },
    "lr_schedule": {"kind": "cosine", "warmup_steps": 20, "decay_steps": None, "min_ratio": 0.1},
    "precision": {"dtype": "fp32", "initial_loss_scale": 65536.0, "loss_scale_window": 1000},
    "trainer": {
        "max_steps": 400,
        "val_every": 50,
        "val_batches": 4,
        "log_every": 10,
        "checkpoint_every": 0,
        "keep_checkpoints": 1,
        "recompute": "none",
        "loss_chunk": 512,
        "progress": "none",
    },
    "evaluation": {"batches": 8, "thresholds": [0.2, 0.4, 0.6, 0.8, 0.9], "calibration_bins": 10},
    "decoding": {
        "mode": "catch_up",
        "prompts": ["def main("],
        "max_new_tokens": 64,
        "max_pending": None,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "stop": [],
        "stop_at_eos": True,
    },
    "exit_policy": {"kind": "max_probability", "threshold": 0.8, "layer": None, "active": None, "min_new_tokens": 0},
    "logger": {"csv": True, "wandb": {"mode": "off", "project": "eellm", "entity": None, "group": None, "tags": ["test"]}},
    "debug": {"detect_anomaly": False, "profile": False, "overfit": False},
    "study": None,
}


def example_config(overrides: dict[str, Any] | None = None) -> Config:
    """The values above with dotted overrides, e.g. {"logger.wandb.mode": "offline"}."""
    values = copy.deepcopy(VALUES)
    for path, value in (overrides or {}).items():
        *parents, last = path.split(".")
        node = values
        for parent in parents:
            node = node[parent]
        node[last] = value
    return Config.model_validate(values)
