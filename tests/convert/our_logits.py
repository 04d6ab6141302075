"""Runs on forked ranks: logits of an imported run, from whole sequences and token by token."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from eellm.config.compose import compose
from eellm.config.schema import Config
from eellm.data.batch import Microbatch
from eellm.decoding.model.ragged import Span
from eellm.decoding.model.segments import InferenceModel
from eellm.engine.chunks import Chunks
from eellm.mcore.groups import init_groups
from eellm.model.context import Context
from eellm.model.spec import tied_stages
from eellm.model.stage import Readout
from eellm.tasks.session import Plan
from eellm.tasks.trained import load_trained

PROMPT = 9


class Logits:
    """A head visitor that keeps every head's logits [s, b, this rank's entries of the vocabulary]."""

    def __init__(self) -> None:
        self.of: dict[str, torch.Tensor] = {}

    def at_exit(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        features = readout.head.features(hidden, context)
        rows = readout.vocabulary.logits(features.flatten(0, 1), readout.weight)
        self.of[readout.name] = rows.unflatten(0, features.shape[:2])
        return hidden

    def at_final(self, hidden: torch.Tensor, readout: Readout, context: Context) -> torch.Tensor:
        return self.at_exit(hidden, readout, context).sum()


def loaded(run: str, overrides: list[str]) -> tuple[Config, Chunks]:
    config = compose(["task=generate", f"checkpoint={run}", "device=cpu", *overrides])
    assert config.model.vocab_size is not None
    plan = Plan.of(config, config.model.vocab_size)
    groups = init_groups(plan.layout, torch.device("cpu"), tied_stages(plan.spec, plan.stages))
    return config, load_trained(config, plan, groups)


@torch.no_grad()
def whole_sequences(rank: int, run: str, overrides: list[str], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Head name -> logits [b, s, this rank's entries] of token ids [b, s]; of the heads on this pipeline stage."""
    _, chunks = loaded(run, overrides)
    (stage,), groups = chunks.stages, chunks.groups
    tokens = torch.from_numpy(ids)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Microbatch(tokens, tokens, torch.ones(tokens.shape), positions)
    neighbour = groups.layout.tp
    if not stage.pre_process:
        hidden = torch.empty(tokens.shape[1], tokens.shape[0], stage.spec.hidden_size)
        dist.recv(hidden, rank - neighbour)
        stage.set_input_tensor(hidden)
    visitor = Logits()
    out = stage(batch, visitor)
    if not stage.post_process:
        dist.send(out, rank + neighbour)
    return {name: logits.transpose(0, 1).numpy() for name, logits in visitor.of.items()}


@torch.no_grad()
def token_by_token(rank: int, run: str, ids: np.ndarray) -> np.ndarray:
    """The final head's logits [s, vocabulary] of one text, as decoding computes them: a prompt, then one token after another."""
    _, chunks = loaded(run, [])
    model = InferenceModel(chunks.stages[0].requires_grad_(False))
    cache, rows = model.cache(len(ids)), []
    for start, end in [(0, PROMPT), *((place, place + 1) for place in range(PROMPT, len(ids)))]:
        context = model.context(cache, [Span(0, start, end - start)])
        hidden = model.embed(ids[start:end].tolist(), range(start, end))
        for segment in model.segments:
            hidden = segment.forward(hidden, context)
        assert model.final is not None
        features = model.features(model.final, hidden, context).flatten(0, 1)
        rows.append(model.vocabulary.logits(features, model.final.weight))
    return torch.cat(rows).numpy()
