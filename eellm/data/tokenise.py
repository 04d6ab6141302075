"""Documents to token ids, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from eellm.data.sources.document import Document, free_memory
from eellm.data.tokenizer import Tokenizer
from eellm.errors import DataError


def batched(source: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Runs of documents with at least so many characters in all; the last may have fewer."""
    batch: list[Document] = []
    gathered = 0
    for document in source:
        batch.append(document)
        gathered += len(document.text)
        if gathered >= characters:
            yield batch
            batch, gathered = [], 0
    if batch:
        yield batch


def encode_documents(tokenizer: Tokenizer, batch: list[Document]) -> list[np.ndarray]:
    """Token ids of every document, its end-of-document token behind them.

    Raises DataError with the name of a document that memory is too small for, alone; together they may be too large.
    """
    try:
        return [_ended(ids, tokenizer) for ids in tokenizer.encode_batch([document.text for document in batch])]
    except MemoryError:
        return [_encoded_alone(tokenizer, document) for document in batch]


def _encoded_alone(tokenizer: Tokenizer, document: Document) -> np.ndarray:
    try:
        return _ended(tokenizer.encode(document.text), tokenizer)
    except MemoryError as error:
        raise DataError(
            f"document {document.name}: out of memory while tokenising its {len(document.text):,} characters "
            f"({free_memory() / 1e6:,.1f} MB are free). Cut it into several documents, or use a machine with more memory."
        ) from error


def _ended(ids: list[int], tokenizer: Tokenizer) -> np.ndarray:
    return np.asarray([*ids, tokenizer.eod_id])
