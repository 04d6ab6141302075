"""Initial values that do not depend on the layout: each parameter is drawn from its own generator, seeded by its global name.

Every rank draws the whole parameter and keeps its slice, so tied copies and all layouts agree without communication.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from eellm.model.spec import ModelSpec

if TYPE_CHECKING:
    from eellm.model.stage import Stage

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialise(stage: Stage, seed: int, tp_rank: int) -> None:
    """Fill a stage with initial values."""
    for name, parameter in stage.named_parameters():
        source = source_name(stage.spec, stage.global_name(name))
        whole = initial_value(stage.spec, source, _whole_shape(parameter, stage), seed, parameter.device)
        parameter.copy_(_slice(whole, parameter, source, tp_rank, stage))


def initial_value(
    spec: ModelSpec, name: str, shape: Sequence[int], seed: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A whole parameter: norms 1, biases 0, matrices N(0, init_std), residual outputs scaled by 1 / sqrt(2 num_layers)."""
    if name.endswith("bias"):
        return torch.zeros(*shape, device=device)
    if "norm" in name.rsplit(".", 2)[-2]:
        return torch.ones(*shape, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    std = spec.init_std / (2 * spec.num_layers) ** 0.5 if name.endswith(_RESIDUAL_OUTPUTS) else spec.init_std
    return torch.empty(*shape, device=device).normal_(0.0, std, generator=generator)


def source_name(spec: ModelSpec, name: str) -> str:
    """The parameter whose initial value `name` takes: itself, or with `exits.init=copy` the backbone's counterpart.

    EE-Tuning (arXiv 2402.00518, section 3.1): norm and output matrix from the final head, the MLP from the same
    layer, the block from the last layer.
    """
    match = re.fullmatch(r"heads\.exit_(\d+)\.(.+)", name)
    if spec.exit_init != "copy" or match is None:
        return name
    layer, rest = int(match[1]), match[2]
    if rest.startswith("block."):
        return f"layers.{spec.num_layers}.{rest.removeprefix('block.')}"
    if rest.startswith(("mlp.", "mlp_norm.")):
        return f"layers.{layer}.{rest}"
    if rest == "output.weight":
        return "embedding.tokens.weight" if spec.tie_embeddings else "output.weight"
    return f"heads.final.{rest}"


def _whole_shape(parameter: Any, stage: Stage) -> list[int]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= stage.config.tensor_model_parallel_size
    return shape


def _slice(whole: torch.Tensor, parameter: Any, name: str, tp_rank: int, stage: Stage) -> torch.Tensor:
    """This rank's part. Of a gated MLP's first matrix [gate; up] each rank holds a slice of both halves."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim = parameter.partition_dim
    halves = 2 if stage.spec.gated and name.endswith("linear_fc1.weight") else 1
    parts = whole.unflatten(dim, (halves, stage.config.tensor_model_parallel_size, -1))
    return parts.select(dim + 1, tp_rank).flatten(dim, dim + 1)
