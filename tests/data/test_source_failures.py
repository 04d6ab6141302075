"""What can go wrong with files and memory while a corpus is read: a DataError that names the place and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eellm.data import tokenise
from eellm.data.corpus import prepare_corpus
from eellm.data.sources import document, json_lines
from eellm.data.text import documents, fingerprint
from eellm.data.tokenise import encode_documents
from eellm.errors import DataError


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_text_larger_than_memory_is_not_read(data_config, text_folder, monkeypatch):
    path = text_folder / "first" / "huge.txt"
    path.write_text("x" * 5_000_000)
    monkeypatch.setattr(document, "free_memory", lambda: 7_000_000)
    read = Path.read_bytes

    def watched(self: Path) -> bytes:
        assert self != path, "read all the same"
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", watched)
    with pytest.raises(DataError, match=r"first/huge\.txt: one document of 5\.0 MB; .* 7\.0 MB are free\. Cut it"):
        list(documents(data_config(text_folder)))


def test_a_line_larger_than_memory_is_not_read(data_config, tmp_path, monkeypatch):
    path = lines(tmp_path / "long.jsonl", ["short", "y" * 1_000_000, "after"])
    monkeypatch.setattr(json_lines, "LONG_LINE", 1000)
    assert [len(text) for _, text in documents(data_config(path, source="jsonl"))] == [5, 1_000_000, 5]
    monkeypatch.setattr(document, "free_memory", lambda: 1_500_000)
    with pytest.raises(DataError, match=r"long\.jsonl:2: one document of 1\.0 MB; .* 1\.5 MB are free"):
        list(documents(data_config(path, source="jsonl")))


class Forgetful:
    """A tokenizer for which some texts, or too many at once, are too much."""

    eod_id = 0

    def encode(self, text: str) -> list[int]:
        if "huge" in text:
            raise MemoryError
        return [len(text)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if len(texts) > 2:
            raise MemoryError
        return [self.encode(text) for text in texts]


def test_a_document_that_memory_fails_for_is_named(monkeypatch):
    monkeypatch.setattr(tokenise, "free_memory", lambda: 3_000_000)
    batch = [document.Document(f"some.jsonl:{number}", text) for number, text in enumerate(["a", "bb", "huge one"], start=1)]
    with pytest.raises(DataError, match=r"document some\.jsonl:3: out of memory .* its 8 characters \(3\.0 MB are free\)"):
        encode_documents(Forgetful(), batch)


def test_documents_that_are_too_many_at_once_are_encoded_one_by_one():
    batch = [document.Document(str(number), "x" * number) for number in range(1, 5)]
    assert [ids.tolist() for ids in encode_documents(Forgetful(), batch)] == [[1, 0], [2, 0], [3, 0], [4, 0]]


@pytest.mark.parametrize("step", [documents, fingerprint])
def test_a_file_that_vanishes_while_reading_is_named(data_config, text_folder, monkeypatch, step):
    data = data_config(text_folder)
    victim = text_folder / "second" / "25.txt"
    listed = Path.glob

    def listing(self: Path, pattern: str):
        found = list(listed(self, pattern))
        victim.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "glob", listing)
    monkeypatch.setattr(Path, "is_file", lambda self: self.suffix == ".txt")
    with pytest.raises(
        DataError, match=r"second/25\.txt: the file was there when the corpus was listed and is gone\. Put it back"
    ):
        list(step(data))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied"), r"no permission to read it\. Change that"),
        (OSError(5, "Input/output error"), r"cannot be read \(Input/output error\)"),
    ],
)
@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_an_unreadable_file_is_named(data_config, tmp_path, monkeypatch, error, told, source):
    """Root may read everything, so the refusal is the system's in words only."""
    path = lines(tmp_path / "closed.txt", ["text"])

    def refuse(self: Path, *_: object, **__: object):
        raise error

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    for step in (documents, fingerprint):
        with pytest.raises(DataError, match=rf"closed\.txt: {told}"):
            list(step(data_config(path, source=source)))


def test_a_source_that_fails_midway_leaves_no_corpus_behind(run_config, text_folder, tmp_path):
    config = run_config(text_folder)
    (text_folder / "zzz.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"zzz\.txt is not UTF-8"):
        prepare_corpus(config)
    (text_folder / "zzz.txt").write_text("good now")
    assert prepare_corpus(config).num_documents == 41


@pytest.mark.parametrize("lost", ["tokens.bin", "tokens.idx", "hashes.npy", "all"])
def test_a_lost_cache_is_named_by_who_opens_it_and_made_again_by_the_same_command(run_config, text_folder, lost):
    config = run_config(text_folder)
    corpus = prepare_corpus(config)
    expected = [window["tokens"].tolist() for window in corpus.open("train")]
    folder = Path(corpus.parts[0].prefix).parent
    if lost == "all":
        shutil.rmtree(folder.parent.parent)
    else:
        (folder / lost).unlink()
    if lost != "hashes.npy":
        with pytest.raises(DataError, match="Prepare the corpus again"):
            corpus.open("train")
    again = prepare_corpus(config)
    assert again == corpus
    assert [window["tokens"].tolist() for window in again.open("train")] == expected
