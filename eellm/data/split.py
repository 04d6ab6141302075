"""Which documents train and which are held out: by content, so that it depends on nothing else."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from eellm.data.stored import Store

logger = logging.getLogger(__name__)


def split_documents(hashes: np.ndarray, lengths: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Document numbers (training, validation), each sorted.

    `hashes` uint64 [documents] of the texts, `lengths` in tokens, `held_out` the share of all tokens to hold out. Documents
    are held out in the order of their hashes, which spreads them over the corpus; equal texts have one hash and stay
    together, so that nothing held out is also trained on. Where there is a choice, both sides get at least one document.
    """
    _, group = np.unique(hashes, return_inverse=True)
    tokens = np.zeros(group.max() + 1, dtype=np.int64)
    np.add.at(tokens, group, lengths)
    target = held_out * int(tokens.sum())
    # tokens held out if the first k groups are
    reached = np.concatenate([[0], np.cumsum(tokens)])
    number = int(np.argmin(np.abs(reached - target)))
    if 0.0 < held_out < 1.0 and len(tokens) > 1:
        number = min(max(number, 1), len(tokens) - 1)
    validation = group < number
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def split_stores(stores: list[Store], held_out: list[Store], share: float) -> list[dict[str, np.ndarray]]:
    """For every store (first `stores`, then `held_out`) the document numbers of its splits, by name.

    Without stores that are held out as such, `share` of all documents are: of all stores at once, so that a document that
    is in two of them is on one side. With them the others train, without the documents that are held out too.
    """
    hashes = [store.hashes for store in stores]
    if held_out:
        forbidden = np.concatenate([store.hashes for store in held_out])
        chosen = [np.flatnonzero(~np.isin(own, forbidden)) for own in hashes]
        left_out = sum(len(own) for own in hashes) - sum(map(len, chosen))
        if left_out:
            logger.warning("%d documents of data.path are in data.validation_path too: they are not trained on", left_out)
        every = [{"validation": np.arange(len(store.hashes))} for store in held_out]
        return [{"train": numbers} for numbers in chosen] + every
    lengths = np.concatenate([store.lengths for store in stores])
    begins = np.cumsum([0, *(len(own) for own in hashes)])
    sides = split_documents(np.concatenate(hashes), lengths, share)
    # a side that is wanted and comes out empty is there, for the caller to refuse
    wanted = {name: side for name, side, part in zip(("train", "validation"), sides, (1 - share, share), strict=True) if part > 0}
    return [
        {name: side[(side >= begin) & (side < end)] - begin for name, side in wanted.items()}
        for begin, end in itertools.pairwise(begins)
    ]
