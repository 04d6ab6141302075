"""A document, and whether there is memory for it."""

from __future__ import annotations

from typing import NamedTuple

import psutil

from eellm.errors import DataError

BYTES_IN_MEMORY = 2
"""Memory per byte of a text while it is read: its bytes and the string made of them."""


class Document(NamedTuple):
    """A text and where it stands: a path inside the corpus, with `:line` (jsonl), `#section` or `#row` behind it."""

    name: str
    text: str


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    return psutil.virtual_memory().available


def check_memory(place: object, size: int) -> None:
    """Raises DataError where a document of `size` bytes cannot be read into the memory that is free."""
    free = free_memory()
    if size * BYTES_IN_MEMORY > free:
        raise DataError(
            f"{place}: one document of {size / 1e6:,.1f} MB; reading it takes {BYTES_IN_MEMORY} times as much memory, and "
            f"{free / 1e6:,.1f} MB are free. Cut it into several documents, or read it on a machine with more memory."
        )
