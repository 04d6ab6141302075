"""Damaged .bin/.idx files: each is named with what is wrong, before anything maps it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from eellm.errors import DataError
from eellm.mcore.datasets import open_documents
from tests.data.tokens import random_documents, write_pair

COUNT = 12


def edited(ending: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}{ending}")
        path.write_bytes(change(path.read_bytes()))

    return damage


def removed(*endings: str) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        for ending in endings:
            Path(f"{prefix}{ending}").unlink()

    return damage


DAMAGES = {
    "magic": (edited(".idx", lambda idx: b"X" + idx[1:]), r"p\.idx: not an index of tokens"),
    "text": (edited(".idx", lambda _: b"hello"), r"p\.idx: not an index of tokens"),
    "header": (edited(".idx", lambda idx: idx[:20]), r"p\.idx: cut short within its first 34 bytes"),
    "version": (edited(".idx", lambda idx: idx[:9] + struct.pack("<Q", 2) + idx[17:]), r"p\.idx: version 2"),
    "dtype": (edited(".idx", lambda idx: idx[:17] + b"\x63" + idx[18:]), r"p\.idx: 99 is no type of tokens"),
    "float": (edited(".idx", lambda idx: idx[:17] + b"\x07" + idx[18:]), r"p\.idx: holds float32 values"),
    "wider": (edited(".idx", lambda idx: idx[:17] + b"\x04" + idx[18:]), r"p\.idx: damaged: its sequences do not follow"),
    "truncated": (edited(".idx", lambda idx: idx[:-1]), rf"p\.idx: cut short: {COUNT} sequences need [\d,]+ bytes"),
    "counts": (edited(".idx", lambda idx: idx[:18] + struct.pack("<Q", 10**15) + idx[26:]), r"p\.idx: cut short"),
    "negative": (edited(".idx", lambda idx: idx[:34] + struct.pack("<i", -5) + idx[38:]), r"p\.idx: damaged"),
    "bounds": (edited(".idx", lambda idx: idx[:-8] + struct.pack("<q", COUNT + 3)), r"p\.idx: damaged: its documents"),
    "short": (edited(".bin", lambda tokens: tokens[:-2]), r"p\.bin: is cut short: it has [\d,]+ bytes, and p\.idx describes"),
    "long": (edited(".bin", lambda tokens: tokens + b"\0\0"), r"p\.bin: belongs to another index"),
    "no bin": (removed(".bin"), r"p\.bin: there is no such file \(p\.idx is there\)"),
    "no idx": (removed(".idx"), r"p\.idx: there is no such file \(p\.bin is there\)"),
    "neither": (removed(".idx", ".bin"), r"p\.idx: there is no such file \(neither is p\.bin\)"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(tmp_path, name):
    prefix = write_pair(tmp_path / "p", random_documents(0, COUNT))
    assert len(open_documents(prefix)) == COUNT
    damage, told = DAMAGES[name]
    damage(prefix)
    with pytest.raises(DataError, match=told):
        open_documents(prefix)


@pytest.mark.parametrize("documents", [[], [[[]], [[]]]], ids=["no documents", "empty documents"])
def test_nothing_inside_is_named(tmp_path, documents):
    with pytest.raises(DataError, match=r"p\.(idx|bin): holds no (documents|tokens)"):
        open_documents(write_pair(tmp_path / "p", documents))


def test_an_unreadable_index_is_named(tmp_path, monkeypatch):
    """Root may read everything, so the refusal is the system's in words only."""
    prefix = write_pair(tmp_path / "p", random_documents(0, COUNT))

    def refuse(path: Path, *_: object):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"p\.idx: cannot be read \(Permission denied\)"):
        open_documents(prefix)
