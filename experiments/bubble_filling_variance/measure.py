"""Var(e) + 2 Cov(e, later losses) of the first stage's gradients, on a trained and on a fresh model; see README.md."""

from __future__ import annotations

import csv
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch

from eellm.config.compose import compose
from eellm.config.schema import Config
from eellm.data.batch import GlobalBatch
from eellm.data.batches import loader, validation_batches
from eellm.data.corpus import prepare_corpus
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.engine.megatron import MegatronEngine
from eellm.mcore.checkpoint import load_stages
from eellm.model.objective import HeadWeights, ObjectiveOptions
from eellm.tasks.session import Plan, groups_of, process_group
from eellm.tasks.source import checkpoint_folder, with_trained_tokenizer

STAGES, MICROBATCHES, ORDINARY, PART_ONE = 4, 64, 8, 2


def first_stage_gradient(chunks: Chunks, engine: MegatronEngine, batch: GlobalBatch, heads: dict[str, float]) -> torch.Tensor:
    """Of the weighted mean losses of one microbatch, at everything that stands on the first of four stages, as one vector."""
    chunks.zero_grad()
    engine.run(batch, HeadWeights(heads))
    depth = chunks.spec.num_layers // STAGES
    mine = tuple(f"layers.{layer}." for layer in range(1, depth + 1))
    parameters = [parameter for name, parameter in chunks.stages[0].named_parameters() if name.startswith(mine)]
    return torch.cat([parameter.main_grad.flatten() for parameter in parameters])


def measured(config: Config, chunks: Chunks, batches: list[GlobalBatch]) -> dict[str, float]:
    """Variances are sums over the first stage's parameters, of a microbatch's gradient around their mean."""
    engine = MegatronEngine(chunks, ObjectiveOptions(chunk=config.trainer.loss_chunk))
    first = chunks.spec.exits[0].name
    own = {head: float(head == first) for head in chunks.spec.heads}
    later = {head: float(head != first) for head in chunks.spec.heads}
    e, l = (torch.stack([first_stage_gradient(chunks, engine, batch, heads) for batch in batches]) for heads in (own, later))  # noqa: E741
    e, l = e - e.mean(0), l - l.mean(0)  # noqa: E741
    scale = 1 / (len(batches) - 1)
    var_e, var_l, cov = (float((x * y).sum()) * scale for x, y in ((e, e), (l, l), (e, l)))
    ordinary, filled = 1 / ORDINARY, 1 / (ORDINARY + PART_ONE)
    ratio = (var_l * ordinary + (var_e + 2 * cov) * filled) / ((var_l + var_e + 2 * cov) * ordinary)
    correlation = cov / (var_e * var_l) ** 0.5
    condition = var_e + 2 * cov
    return {"var_e": var_e, "var_later": var_l, "correlation": correlation, "condition": condition, "variance_ratio": ratio}


def main(folder: Path) -> None:
    config = with_trained_tokenizer(compose(["task=evaluate", "checkpoint=reference", "device=cpu", "data.global_batch_size=4"]))
    corpus = prepare_corpus(config)
    plan = Plan.of(config, corpus.vocab_size)
    rows = []
    with process_group(config, alone=True) as device, groups_of(plan, device, config.seed) as groups:
        found = validation_batches(config, corpus, replace(plan.layout, global_batch_size=4), groups.dp_rank, MICROBATCHES)
        batches = list(itertools.islice(loader(config, found), MICROBATCHES))
        for model in ("trained", "fresh"):
            chunks = build_chunks(plan.spec, plan.stages, groups, ChunkOptions("fp32", seed=1))
            if model == "trained":
                load_stages(checkpoint_folder(config), chunks.stages)
            rows.append({"model": model, "microbatches": len(batches), **measured(config, chunks, batches)})
            print({name: round(value, 6) if isinstance(value, float) else value for name, value in rows[-1].items()})
    with (folder / "variance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
