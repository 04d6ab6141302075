"""Global batches: which samples a data-parallel rank reads for an optimizer step, and how their tensors look.

Sample numbers count from the start of training. A step reads the samples that follow those of the step before, as many
as `eellm.data.ramp_up` says, whatever the layout; the layout only says which rank reads which of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from eellm.config.schema import Config, RampUpConfig
from eellm.data.batch import GlobalBatch
from eellm.data.corpus import Corpus
from eellm.data.ramp_up import BatchSizes
from eellm.layout import ParallelLayout


class WindowDataset(Protocol):
    """Item i is a training window: `tokens` and `labels` int64 [s], `loss_mask` float32 [s]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]: ...


class Order(Protocol):
    """Global sample number -> index in the dataset."""

    def __call__(self, number: int) -> int: ...


@dataclass(frozen=True)
class BatchPlan:
    """Which samples are read, and what their document boundaries mean (`data.document_boundaries`).

    `start` = samples consumed before the first batch; `num_batches` None = no end; from sample number `num_samples` on
    (None = never) samples are there to fill a batch and have no loss; `repeat` = the first batch over and over; without
    `ramp_up` every batch has the layout's global size.
    """

    layout: ParallelLayout
    dp_rank: int
    eod_id: int
    boundaries: str = "ignore"
    start: int = 0
    num_batches: int | None = None
    num_samples: int | None = None
    repeat: bool = False
    ramp_up: RampUpConfig | None = None

    def sample_ids(self, step: int) -> torch.Tensor:
        """Sample numbers of this rank, int64 [M, b], counting steps from `start`.

        Microbatch m of rank r is the (m dp + r)-th group of b.
        """
        layout = self.layout
        first, size = BatchSizes(layout.global_batch_size, self.ramp_up).step(0 if self.repeat else step, self.start)
        groups = torch.arange(first, first + size).view(-1, layout.dp, layout.micro_batch_size)
        return groups[:, self.dp_rank].contiguous()


class GlobalBatches(IterableDataset[GlobalBatch]):
    """Yields the `GlobalBatch` of one data-parallel rank for step after step; for `DataLoader(batch_size=None)`.

    With loader workers, worker w of n makes the steps w, w + n, ...: the loader asks its workers in turn, so the order
    is that of no workers.
    """

    def __init__(self, dataset: WindowDataset, order: Order, plan: BatchPlan):
        super().__init__()
        self.dataset = dataset
        self.order = order
        self.plan = plan

    def __iter__(self) -> Iterator[GlobalBatch]:
        worker = get_worker_info()
        step, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while self.plan.num_batches is None or step < self.plan.num_batches:
            yield self.batch(step)
            step += stride

    def batch(self, step: int) -> GlobalBatch:
        """The batch of a step, counted from the plan's start."""
        plan = self.plan
        ids = plan.sample_ids(step)
        windows = [self.dataset[self.order(int(number))] for number in ids.flatten()]
        tokens, labels, loss_mask = (
            torch.stack([window[key] for window in windows]).view(*ids.shape, -1) for key in ("tokens", "labels", "loss_mask")
        )
        if plan.num_samples is not None:
            loss_mask = loss_mask * (ids < plan.num_samples).unsqueeze(-1)
        if plan.boundaries != "ignore":
            loss_mask = loss_mask * (tokens != plan.eod_id)
        positions, documents = torch.arange(tokens.shape[-1]).expand_as(tokens).contiguous(), None
        if plan.boundaries == "reset":
            positions, documents = restart_at_documents(tokens, plan.eod_id)
        return GlobalBatch(tokens, labels, loss_mask, positions, documents, ids)


def restart_at_documents(tokens: torch.Tensor, eod_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions int64, documents int32), both shaped as `tokens` [..., s].

    Positions count from 0 in every document; documents are numbered from 0 in every sequence. The end-of-document token
    belongs to the document that it ends.
    """
    place = torch.arange(tokens.shape[-1]).expand_as(tokens)
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[..., 1:] = tokens[..., :-1] == eod_id
    start = torch.where(begins, place, 0).cummax(dim=-1).values
    return place - start, begins.cumsum(dim=-1, dtype=torch.int32)


def training_batches(
    config: Config, corpus: Corpus, layout: ParallelLayout, dp_rank: int, consumed_samples: int
) -> GlobalBatches:
    """Endless training data from sample `consumed_samples` on; with debug.overfit the first batch, again and again."""
    dataset = corpus.open("train")
    overfit = config.debug.overfit
    plan = BatchPlan(
        layout,
        dp_rank,
        corpus.eod_id,
        config.data.document_boundaries,
        start=0 if overfit else consumed_samples,
        repeat=overfit,
        ramp_up=config.data.ramp_up,
    )
    return GlobalBatches(dataset, corpus.training_order(config.seed), plan)


def validation_batches(config: Config, corpus: Corpus, layout: ParallelLayout, dp_rank: int, num_batches: int) -> GlobalBatches:
    """The first `num_batches` global batches of the held-out samples, the same each time and on all layouts.

    Fewer where fewer are held out: no sample counts twice. Held-out samples that fill no global batch are left out,
    unless they are all there are: then the one batch is filled up with samples without loss.
    """
    dataset, available = corpus.open("validation"), corpus.validation_samples
    plan = BatchPlan(
        layout,
        dp_rank,
        corpus.eod_id,
        config.data.document_boundaries,
        num_batches=min(num_batches, max(1, available // layout.global_batch_size)),
        num_samples=available,
    )
    return GlobalBatches(dataset, corpus.validation_order(), plan)


def loaders(
    config: Config, corpus: Corpus, layout: ParallelLayout, dp_rank: int, consumed_samples: int
) -> tuple[DataLoader, DataLoader | None]:
    """(training, validation) loaders of one data-parallel rank; no validation loader where nothing is held out."""
    training = training_batches(config, corpus, layout, dp_rank, consumed_samples)
    validation = None
    if corpus.validation_samples > 0:
        validation = loader(config, validation_batches(config, corpus, layout, dp_rank, config.trainer.val_batches))
    return loader(config, training), validation


def loader(config: Config, batches: GlobalBatches) -> DataLoader:
    """A loader of whole global batches, in their order."""
    # Of its own generator, because a loader otherwise draws from torch's global one each time it is started, and then
    # whether a run validates would change what it trains.
    return DataLoader(batches, batch_size=None, num_workers=config.data.num_workers, generator=torch.Generator())
