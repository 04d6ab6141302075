"""Which documents train and which are held out: by content, so that it depends on nothing else."""

from __future__ import annotations

import numpy as np


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
