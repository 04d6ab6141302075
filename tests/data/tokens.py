"""Small .bin/.idx files, written by megatron-core's own builder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

EOD = 0
VOCABULARY = 100


def write_pair(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: type = np.uint16) -> Path:
    """Each document is a list of sentences, each a list of ids."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sentences in documents:
        for sentence in sentences:
            builder.add_item(torch.tensor(sentence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def random_documents(seed: int, count: int, low: int = 1, high: int = VOCABULARY, end: bool = True) -> list[list[list[int]]]:
    """Documents of 5 to 60 ids between `low` and `high`, with the end-of-document token behind them."""
    rng = np.random.default_rng(seed)
    return [[[*rng.integers(low, high, rng.integers(5, 60)).tolist(), *([EOD] if end else [])]] for _ in range(count)]


def write_tokenizer(path: Path, size: int = VOCABULARY) -> Path:
    """A tokenizer.json of so many entries whose end-of-document token is 0."""
    vocabulary = {"<|endoftext|>": EOD} | {f"w{number}": number for number in range(1, size)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w1")).save(str(path))
    return path
