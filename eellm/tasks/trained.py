"""A trained model, read from a run's checkpoint onto the layout of the run that asks."""

from __future__ import annotations

from eellm.config.schema import Config
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.mcore.checkpoint import load_stages
from eellm.mcore.groups import Groups
from eellm.tasks.session import Plan
from eellm.tasks.source import checkpoint_folder


def load_trained(config: Config, plan: Plan, groups: Groups) -> Chunks:
    """This rank's stages with the checkpoint's weights, in evaluation mode and without gradient buffers."""
    options = ChunkOptions(config.precision.dtype, seed=None, trainable=False)
    chunks = build_chunks(plan.spec, plan.stages, groups, options)
    load_stages(checkpoint_folder(config), chunks.stages)
    for stage in chunks.stages:
        stage.eval()
    return chunks
