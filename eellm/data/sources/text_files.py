"""Text files: each a document, or one given alone cut into several."""

from __future__ import annotations

from collections.abc import Iterator

from eellm.config.schema import DataConfig
from eellm.data.sources.document import Document
from eellm.data.sources.files import given_files, given_path, whole_text

SECTION_CHARACTERS = (1024, 16384)
"""A text file given alone is cut into documents, so that it can be split by document: 64 of them, in these bounds."""


def documents(data: DataConfig) -> Iterator[Document]:
    alone = given_path(data).is_file()
    for name, path in given_files(data):
        text = whole_text(path)
        if alone:
            for number, section in enumerate(sections(text, section_length(text)), start=1):
                yield Document(f"{name}#{number}", section)
        else:
            yield Document(name, text)


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
