"""The documents of a corpus, in a fixed order, and a fingerprint of what they were read from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator

from eellm.config.schema import DataConfig
from eellm.data.sources import chats, hugging_face, json_lines, standard_library, text_files
from eellm.data.sources.document import Document
from eellm.data.sources.files import NamedFile, given_files, reading
from eellm.errors import DataError

READER_VERSION = 1
"""Raised whenever the same files give other documents, so that caches of the old ones are not used."""

_READERS: dict[str, Callable[[DataConfig], Iterator[Document]]] = {
    "stdlib": standard_library.documents,
    "text": text_files.documents,
    "jsonl": json_lines.documents,
    "chats": chats.documents,
    "huggingface": hugging_face.documents,
}


def documents(data: DataConfig) -> Iterator[Document]:
    """Every document that is not blank, in the order of the files' names.

    Raises DataError for a missing path, an undecodable file, a bad JSON line, and a corpus without documents.
    """
    found = False
    for document in _READERS[data.source](data):
        if document.text.strip():
            found = True
            yield document
    if not found:
        where = "the interpreter's standard library" if data.source == "stdlib" else f"data.path={data.path}"
        raise DataError(f"data.source={data.source}: {where} holds no text. Point data.path at text, or check data.pattern.")


def fingerprint(data: DataConfig) -> str:
    """Hash of the corpus: the files' names and bytes and how they are read. Equal fingerprints give equal documents."""
    digest = hashlib.blake2b(json.dumps([READER_VERSION, data.source, data.text_field]).encode(), digest_size=16)
    if data.source == "huggingface":
        # a data set's own fingerprint follows places and times; only its text is what it is
        for document in documents(data):
            content = document.text.encode()
            digest.update(f"\0{len(content)}\0".encode() + content)
        return digest.hexdigest()
    for name, path in corpus_files(data):
        with reading(path):
            digest.update(f"\0{name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def corpus_files(data: DataConfig) -> list[NamedFile]:
    """(name inside the corpus, path) of the corpus's files, sorted by name. Raises DataError when there are none."""
    return standard_library.files(data) if data.source == "stdlib" else given_files(data)
