"""Tokenised documents on disk and the training windows cut from them, as megatron-core keeps them.

`.bin`/`.idx` files are megatron-core's own, so a corpus prepared with its tools can be opened here. The windows are
those of `GPTDataset` for one epoch: the documents, in an order shuffled once, end to end, cut every `sequence_length`
tokens; the last token of a window is the first of the next. Order over and between epochs is not its business (see
`eellm.data.order`).

`GPTDataset` is constructed directly, which needs no process group. It leaves its indices in a folder. Where
torch.distributed runs, only rank 0 would write them, so `build_windows` is for the parent, before ranks start.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder, get_bin_path, get_idx_path
from megatron.core.datasets.utils import Split

from eellm.errors import DataError
from eellm.mcore.index_file import check_pair

# One seed for all runs: windows then are cached once per corpus, and held-out windows are the same whatever the run's seed.
_WINDOW_SEED = 0

_SPLITS = {"train": Split.train, "validation": Split.valid}


@dataclass(frozen=True)
class WindowSource:
    """What windows are cut from. `prefix` names the .bin/.idx files; `split` is `train` or `validation`;
    `documents` int [n] are the documents of the split; `folder` holds the indices."""

    prefix: Path
    split: str
    documents: np.ndarray
    sequence_length: int
    folder: Path


def write_documents(prefix: Path, documents: Iterable[np.ndarray], vocab_size: int) -> None:
    """Write `prefix`.bin and .idx, one sequence per document: uint16 for vocabularies below 65500, int32 above."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=DType.optimal_dtype(vocab_size))
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(get_idx_path(str(prefix)))


def merge_documents(prefix: Path, shards: Iterable[Path], vocab_size: int) -> None:
    """Write `prefix`.bin and .idx with the documents of all shards, one shard after the other."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=DType.optimal_dtype(vocab_size))
    # add_index collects garbage after every shard; with all of torch to look through that is what takes the time
    gc.freeze()
    try:
        for shard in shards:
            builder.add_index(str(shard))
    finally:
        gc.unfreeze()
    builder.finalize(get_idx_path(str(prefix)))


class Documents(IndexedDataset):
    """`.bin`/`.idx` files by document: one that was stored sentence by sentence is read as one piece, an empty one left out."""

    def initialize(self, *settings: object) -> None:
        """Called by `__init__` and, in a loader's process, by `__setstate__`."""
        super().initialize(*settings)
        index, bounds = self.index, np.unique(self.index.document_indices)
        begins = bounds[:-1]
        index.sequence_lengths = np.add.reduceat(index.sequence_lengths, begins, dtype=np.int64).astype(np.int32)
        index.sequence_pointers = index.sequence_pointers[begins]
        filled = index.sequence_lengths > 0
        index.sequence_lengths, index.sequence_pointers = index.sequence_lengths[filled], index.sequence_pointers[filled]
        index.sequence_count = len(index.sequence_lengths)
        index.document_indices = np.arange(index.sequence_count + 1)


def open_documents(prefix: Path) -> Documents:
    """Memory-map `prefix`.bin and .idx; item i is the tokens of document i.

    Raises DataError when they are missing, damaged, or hold nothing.
    """
    check_pair(prefix)
    if not Path(get_bin_path(str(prefix))).stat().st_size:
        raise DataError(f"{prefix}.bin: holds no tokens. Prepare it from text that is not empty.")
    return Documents(str(prefix))


def build_windows(source: WindowSource) -> int:
    """Write the indices of the windows into the source's folder; returns how many windows there are."""
    return len(_dataset(source))


def open_windows(source: WindowSource) -> GPTDataset:
    """The windows that `build_windows` indexed. Item i has `tokens` and `labels` int64 [s] and `loss_mask` float32 [s].

    Safe on any number of ranks at once. Raises DataError when the indices are missing.
    """
    if not any(source.folder.glob(f"*-{_SPLITS[source.split].name}-shuffle_index.npy")):
        raise DataError(
            f"{source.folder}: no window index of the {source.split} split; was the cache cleared meanwhile? "
            "Prepare the corpus again: start the same command again."
        )
    return _dataset(source)


def _dataset(source: WindowSource) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=_WINDOW_SEED,
        sequence_length=source.sequence_length,
        path_to_cache=str(source.folder),
        tokenizer=_NoTokenizer(),
        # boundaries between documents are marked by eellm.data.batches, which also numbers the documents
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # The second argument only names the cached indices; a fixed name lets a cache folder be moved.
    return GPTDataset(open_documents(source.prefix), source.prefix.name, source.documents, None, _SPLITS[source.split], config)


@dataclass(frozen=True)
class _NoTokenizer:
    """What GPTDataset asks of a tokenizer when the text is tokenised already: ids that occur nowhere."""

    pad: int = -1
    eod: int = -2
    vocab_size: None = None
    special_tokens_dict: dict[str, int] = field(default_factory=dict)
    unique_identifiers: dict[str, str] = field(default_factory=dict)
