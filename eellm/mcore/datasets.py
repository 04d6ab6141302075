"""Tokenised documents on disk and the training windows cut from them, as megatron-core keeps them.

`.bin`/`.idx` files are megatron-core's own, so a corpus prepared with its tools can be opened here. The windows are
those of `GPTDataset` for one epoch: the documents, in an order shuffled once, end to end, cut every `sequence_length`
tokens; the last token of a window is the first of the next. Order over and between epochs is not its business (see
`eellm.data.order`).

`GPTDataset` is constructed directly, which needs no process group. It leaves its indices in a folder. Where
torch.distributed runs, only rank 0 would write them, so `build_windows` is for the parent, before ranks start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder, get_bin_path, get_idx_path
from megatron.core.datasets.utils import Split

from eellm.errors import DataError

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


def open_documents(prefix: Path) -> IndexedDataset:
    """Memory-map `prefix`.bin and .idx; item i is the tokens of document i. Raises DataError when they are missing."""
    if not IndexedDataset.exists(str(prefix)):
        raise DataError(f"{prefix}: {prefix.name}.bin or {prefix.name}.idx is missing. Prepare the corpus again.")
    return IndexedDataset(str(prefix))


def build_windows(source: WindowSource) -> int:
    """Write the indices of the windows into the source's folder; returns how many windows there are."""
    return len(_dataset(source))


def open_windows(source: WindowSource) -> GPTDataset:
    """The windows that `build_windows` indexed. Item i has `tokens` and `labels` int64 [s] and `loss_mask` float32 [s].

    Safe on any number of ranks at once. Raises DataError when the indices are missing.
    """
    if not any(source.folder.glob(f"*-{_SPLITS[source.split].name}-shuffle_index.npy")):
        raise DataError(f"{source.folder}: no window index of the {source.split} split. Prepare the corpus again.")
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
