"""Runs on forked ranks: training through Lightning on a package of the standard library as text."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback

from eellm.data.corpus import prepare_corpus
from eellm.mcore.groups import init_groups
from eellm.metrics.recorder import open_recorder
from eellm.model.spec import tied_stages
from eellm.quiet import quiet_dependencies
from eellm.tasks.session import Plan
from eellm.train.fit import TrainingJob, fit
from tests.workers import composed

MODULES = Path(sysconfig.get_path("stdlib")) / "email"

BASE = [
    "task=train",
    "data=text",
    f"data.path={MODULES}",
    "data.pattern=**/*.py",
    "data.split=[0.8,0.2]",
    "data.sequence_length=32",
    "data.micro_batch_size=2",
    "data.global_batch_size=8",
    "tokenizer.vocab_size=300",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "exits.layers=[1,2,3]",
    "exits.head=[embedding,mlp,norm]",
    "exits.tie_output=[true,true,false]",
    "lr_schedule.warmup_steps=2",
    "trainer.max_steps=6",
    "trainer.val_every=3",
    "trainer.val_batches=2",
    "trainer.log_every=1",
    "trainer.checkpoint_every=4",
    "trainer.progress=none",
]


class Samples(Callback):
    """Remembers which samples every step read on this rank."""

    def __init__(self, seen: list[int]):
        self.seen = seen

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.seen.extend(batch.sample_ids.flatten().tolist())


def train(
    rank: int, overrides: list[str], run_dir: str, resume_from: str | None = None, extra_callbacks: Sequence[Callback] = ()
) -> dict:
    """Sample numbers of every step on this rank, the last metrics, and the names of the checkpoints."""
    quiet_dependencies()
    config = composed([*BASE, f"data.cache_dir={Path(run_dir).parent / 'cache'}", *overrides])
    corpus = prepare_corpus(config)
    plan = Plan.of(config, corpus.vocab_size)
    groups = init_groups(plan.layout, torch.device("cpu"), tied_stages(plan.spec, plan.stages))
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    seen: list[int] = []
    recorder = open_recorder(config, Path(run_dir), groups.is_main)
    job = TrainingJob(config, plan.spec, plan.stages, corpus, Path(run_dir), Path(resume_from) if resume_from else None)
    module = fit(job, groups, recorder, [Samples(seen), *extra_callbacks])
    steps = sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())
    return {"seen": seen, "latest": module.latest, "checkpoints": steps}
