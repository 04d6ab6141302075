"""Models with random weights on a device, alone in their process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eellm.engine.chunks import build_stages
from eellm.layout import ParallelLayout
from eellm.mcore.groups import Groups, destroy_groups, init_groups, init_process_group
from eellm.mcore.parts import transformer_config
from eellm.model.spec import ModelSpec, plan_stages, tied_stages
from eellm.model.stage import Stage

SEED = 11


@contextmanager
def stage_on(device: torch.device, spec_: ModelSpec, dtype: str) -> Iterator[Stage]:
    """The whole model in evaluation mode, and its process group meanwhile."""
    layout = ParallelLayout()
    plan = plan_stages(spec_, layout)
    with groups_on(device, layout, tied_stages(spec_, plan)) as groups:
        config = transformer_config(spec_, layout, dtype, on_cpu=device.type == "cpu")
        yield build_stages(spec_, plan, groups, config, SEED)[0].eval()


@contextmanager
def groups_on(device: torch.device, layout: ParallelLayout, tied: list[int]) -> Iterator[Groups]:
    init_process_group(device, alone=True)
    try:
        yield init_groups(layout, device, tied)
    finally:
        destroy_groups()
