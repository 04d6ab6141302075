"""The documents of a corpus, in a fixed order, and a fingerprint of what they were read from."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from eellm.config.schema import DataConfig
from eellm.errors import DataError

SECTION_CHARACTERS = (1024, 16384)
"""A text file given alone is cut into documents, so that it can be split by document: 64 of them, in these bounds."""

READER_VERSION = 1
"""Raised whenever the same files give other documents, so that caches of the old ones are not used."""

# Installed packages and tests are not part of the library proper, and what the build machine wrote into generated
# files would make the corpus differ between machines with the same interpreter.
_STDLIB_FOLDERS_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "config-*")
_STDLIB_FILES_LEFT_OUT = ("_sysconfigdata*", "sitecustomize.py")


class Document(NamedTuple):
    """A text and where it stands: a path inside the corpus, with `:line` (jsonl) or `#section` behind it."""

    name: str
    text: str


def documents(data: DataConfig) -> Iterator[Document]:
    """Every document that is not blank, in the order of the files' names.

    Raises DataError for a missing path, an undecodable file, a bad JSON line, and a corpus without documents.
    """
    found = False
    for document in _all_documents(data):
        if document.text.strip():
            found = True
            yield document
    if not found:
        raise DataError(f"{_described(data)} holds no text. Point data.path at text, or check data.pattern.")


def fingerprint(data: DataConfig) -> str:
    """Hash of the corpus: the files' names and bytes and how they are read. Equal fingerprints give equal documents."""
    digest = hashlib.blake2b(json.dumps([READER_VERSION, data.source, data.text_field]).encode(), digest_size=16)
    for name, path in corpus_files(data):
        digest.update(f"\0{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def corpus_files(data: DataConfig) -> list[tuple[str, Path]]:
    """(name inside the corpus, path) of the corpus's files, sorted by name. Raises DataError when there are none."""
    root = corpus_root(data)
    if root.is_file():
        return [(root.name, root)]
    paths = _stdlib_files(root) if data.source == "stdlib" else (path for path in root.glob(data.pattern) if path.is_file())
    files = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    if not files:
        raise DataError(f"{_described(data)} has no files. Check data.path and data.pattern.")
    return files


def corpus_root(data: DataConfig) -> Path:
    """File or folder that holds the corpus. Raises DataError when it is not there."""
    if data.source == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    if data.path is None:
        raise DataError(f"data.source={data.source} needs data.path: a file or a folder.")
    root = Path(os.path.expandvars(data.path)).expanduser()
    if not root.exists():
        raise DataError(f"data.path={data.path}: there is no such file or folder ({root.absolute()}).")
    return root


def section_length(text: str) -> int:
    """Least characters of a section of this text."""
    shortest, longest = SECTION_CHARACTERS
    return min(longest, max(shortest, len(text) // 64))


def sections(text: str, length: int) -> Iterator[str]:
    """Cut a text at blank lines (or else line ends) into parts of `length` to 2 x `length` characters; nothing is lost."""
    start = 0
    while start < len(text):
        end = _cut(text, start + length, start + 2 * length)
        yield text[start:end]
        start = end


def _cut(text: str, low: int, high: int) -> int:
    for mark in ("\n\n", "\n"):
        position = text.find(mark, low, high)
        if position >= 0:
            return position + len(mark)
    return high


def _all_documents(data: DataConfig) -> Iterator[Document]:
    alone = data.source == "text" and corpus_root(data).is_file()
    for name, path in corpus_files(data):
        if data.source == "jsonl":
            yield from _json_documents(name, path, data.text_field)
        elif alone:
            text = _read(path)
            for number, section in enumerate(sections(text, section_length(text)), start=1):
                yield Document(f"{name}#{number}", section)
        elif data.source == "text":
            yield Document(name, _read(path))
        else:
            yield from _utf8_document(name, path)


def _stdlib_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        # in place: os.walk then does not descend, and an interpreter's site-packages can be huge
        folders[:] = [name for name in folders if not _matches(name, _STDLIB_FOLDERS_LEFT_OUT)]
        for name in names:
            if name.endswith(".py") and not _matches(name, _STDLIB_FILES_LEFT_OUT):
                yield Path(folder, name)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _utf8_document(name: str, path: Path) -> Iterator[Document]:
    try:
        yield Document(name, path.read_bytes().decode())
    except UnicodeDecodeError:
        return  # a few modules declare an older encoding


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Convert it, or leave it out with data.pattern.") from error


def _json_documents(name: str, path: Path, field: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Document(f"{name}:{number}", _json_text(line, field, f"{path}:{number}"))


def _json_text(line: bytes, field: str, place: str) -> str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start} of the line).") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg}, column {error.colno}). jsonl holds one JSON object a line.") from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        has = f"has the fields {sorted(record)}" if isinstance(record, dict) else f"is a {type(record).__name__}"
        raise DataError(f"{place}: no text in the field '{field}'; the line {has}. Set data.text_field.")
    return record[field]


def _described(data: DataConfig) -> str:
    where = "the interpreter's standard library" if data.source == "stdlib" else f"data.path={data.path}"
    return f"data.source={data.source}: {where}"
