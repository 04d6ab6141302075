"""Is a pair of `.bin`/`.idx` files what it says it is? Checked before megatron-core maps it into memory.

megatron-core asserts little and reads past the end of what was cut off. The index is, little-endian: 9 bytes of magic,
uint64 version, uint8 type of a token, uint64 number of sequences n, uint64 number of document bounds m, then int32 [n]
lengths in tokens, int64 [n] places in the .bin in bytes, int64 [m] bounds: document i is the sequences from bound i to
bound i + 1 (`megatron.core.datasets.indexed_dataset._IndexWriter`).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, get_bin_path, get_idx_path

from eellm.errors import DataError

_COUNTS = struct.Struct("<QBQQ")
_AGAIN = "Write the pair again (task=prepare_data), or copy it again from where it came from."


def check_pair(prefix: Path) -> None:
    """Raises DataError where a file is missing or unreadable, is no index, is cut short, or the two do not belong together."""
    index, tokens = Path(get_idx_path(str(prefix))), Path(get_bin_path(str(prefix)))
    for path, other in ((index, tokens), (tokens, index)):
        if not path.is_file():
            there = f"{other.name} is there" if other.is_file() else f"neither is {other.name}"
            raise DataError(
                f"{path}: there is no such file ({there}). Tokens are a pair of files with one prefix; "
                "Give data.path without the ending. Prepare the corpus again where one is lost."
            )
    try:
        size = _expected_bytes(index)
        found = tokens.stat().st_size
        with tokens.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}). Check its permissions.") from error
    if found != size:
        kind = "is cut short" if found < size else "belongs to another index"
        raise DataError(f"{tokens}: {kind}: it has {found:,} bytes, and {index.name} describes {size:,}. {_AGAIN}")


def _expected_bytes(path: Path) -> int:
    """Size of the .bin that the index describes."""
    with path.open("rb") as file:
        if file.read(len(_INDEX_HEADER)) != _INDEX_HEADER:
            raise DataError(f"{path}: not an index of tokens: it does not begin with {_INDEX_HEADER!r}. {_AGAIN}")
        counts = file.read(_COUNTS.size)
    header = len(_INDEX_HEADER) + _COUNTS.size
    if len(counts) < _COUNTS.size:
        raise DataError(f"{path}: cut short within its first {header} bytes. {_AGAIN}")
    version, code, sequences, bounds = _COUNTS.unpack(counts)
    if version != 1:
        raise DataError(f"{path}: version {version} of the format; version 1 is known. {_AGAIN}")
    dtype = _token_dtype(path, code)
    wanted, found = header + sequences * 12 + bounds * 8, path.stat().st_size
    if found < wanted:
        raise DataError(f"{path}: cut short: {sequences:,} sequences need {wanted:,} bytes, it has {found:,}. {_AGAIN}")
    if sequences == 0:
        raise DataError(f"{path}: holds no documents. Prepare it from text that is not empty.")
    raw = np.memmap(path, mode="r")
    lengths = np.frombuffer(raw, np.int32, sequences, header)
    places = np.frombuffer(raw, np.int64, sequences, header + 4 * sequences)
    ends = np.frombuffer(raw, np.int64, bounds, header + 12 * sequences)
    bytes_before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * dtype.itemsize
    if (lengths < 0).any() or (places != bytes_before[:-1]).any():
        raise DataError(f"{path}: damaged: its sequences do not follow one another. {_AGAIN}")
    if bounds < 2 or ends[0] != 0 or ends[-1] != sequences or (np.diff(ends) < 0).any():
        raise DataError(f"{path}: damaged: its documents do not cover its {sequences:,} sequences. {_AGAIN}")
    return int(bytes_before[-1])


def _token_dtype(path: Path, code: int) -> np.dtype:
    try:
        dtype = np.dtype(DType.dtype_from_code(code))
    except ValueError as error:
        codes = ", ".join(f"{kind.value} {kind.name}" for kind in DType)
        raise DataError(f"{path}: {code} is no type of tokens (known: {codes}). {_AGAIN}") from error
    if not np.issubdtype(dtype, np.integer):
        raise DataError(f"{path}: holds {dtype} values, and token ids are whole numbers. {_AGAIN}")
    return dtype
