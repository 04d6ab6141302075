from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from eellm.data.sources.text_files import section_length, sections
from eellm.data.text import corpus_files, documents, fingerprint
from eellm.errors import DataError


def test_folder_gives_every_file_once_in_order_without_blanks(data_config, text_folder):
    found = list(documents(data_config(text_folder)))
    expected = [path for path in sorted(text_folder.rglob("*.txt"), key=lambda path: path.as_posix()) if path.stem != "blank"]
    assert [name for name, _ in found] == [path.relative_to(text_folder).as_posix() for path in expected]
    assert [text for _, text in found] == [path.read_text(encoding="utf-8") for path in expected]


def test_pattern_selects_files(data_config, text_folder):
    names = [name for name, _ in documents(data_config(text_folder, pattern="second/*.txt"))]
    assert names == [f"second/{number}.txt" for number in range(20, 40)]


def test_stdlib_leaves_out_tests_and_packages(data_config):
    files = corpus_files(data_config(source="stdlib"))
    names = [name for name, _ in files]
    root = Path(sysconfig.get_path("stdlib"))
    assert names == sorted(names)
    assert {"heapq.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    assert not [name for name in names if left_out & set(Path(name).parts)]
    assert files[names.index("heapq.py")][1] == root / "heapq.py"
    assert sum(path.stat().st_size for _, path in files) > 8e6


def test_stdlib_with_its_tests_is_the_library_and_more(data_config):
    proper, all_ = (corpus_files(data_config(source="stdlib", include_tests=tests)) for tests in (False, True))
    more = set(all_) - set(proper)
    assert set(proper) < set(all_)
    assert all({"test", "tests", "idle_test"} & set(Path(name).parts) for name, _ in more)
    assert not [name for name, _ in all_ if "site-packages" in name]


def test_a_file_alone_is_cut_at_blank_lines_and_nothing_is_lost(data_config, tmp_path):
    paragraphs = [f"paragraph {number} " + "word " * (number % 300) for number in range(400)]
    text = "\n\n".join(paragraphs)
    path = tmp_path / "book.txt"
    path.write_text(text)
    found = [part for _, part in documents(data_config(path))]
    assert "".join(found) == text
    assert 32 <= len(found) <= 64
    assert all(part.endswith("\n\n") for part in found[:-1])
    least = len(text) // 64
    assert all(least <= len(part) <= 2 * least for part in found[:-1])


@pytest.mark.parametrize(("characters", "least"), [(100, 1024), (640_000, 10_000), (10**7, 16384)])
def test_sections_are_neither_tiny_nor_huge(characters, least):
    assert section_length("x" * characters) == least


@pytest.mark.parametrize("text", ["x" * 100, "line\n" * 30, "a\n\n" * 40, "one\n\n" + "y" * 90, ""])
def test_sections_are_bounded_and_whole(text):
    parts = list(sections(text, length=10))
    assert "".join(parts) == text
    assert all(len(part) <= 20 for part in parts)
    assert all(len(part) >= 10 for part in parts[:-1])


def test_jsonl_reads_the_named_field_and_skips_blank_lines(data_config, tmp_path):
    path = tmp_path / "some.jsonl"
    texts = ["first\nwith a line", "zweiter 日本"]
    path.write_text("\n\n".join(json.dumps({"body": text, "id": 1}) for text in texts))
    found = list(documents(data_config(path, source="jsonl", text_field="body")))
    assert found == [("some.jsonl:1", texts[0]), ("some.jsonl:3", texts[1])]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"body": "other field"}', "no text in the field 'text'; the line has the fields ['body']"),
        (b'{"text": 3}', "no text in the field 'text'"),
        (b'["text"]', "the line is a list"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_bad_json_lines_are_named_by_file_and_line(data_config, tmp_path, line, told):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        list(documents(data_config(path, source="jsonl")))
    assert f"{path}:2: " in str(error.value)
    assert told in str(error.value)


def test_undecodable_text_file_is_named(data_config, text_folder):
    path = text_folder / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        list(documents(data_config(text_folder)))


def test_missing_and_empty_corpora_are_refused(data_config, tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        list(documents(data_config(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"needs data\.path"):
        list(documents(data_config(None)))
    with pytest.raises(DataError, match="no files"):
        list(documents(data_config(tmp_path)))
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no text"):
        list(documents(data_config(tmp_path)))


def test_fingerprint_follows_names_and_content_not_place(data_config, text_folder, tmp_path):
    before = fingerprint(data_config(text_folder))
    moved = text_folder.rename(tmp_path / "moved")
    assert fingerprint(data_config(moved)) == before
    (moved / "second" / "20.txt").write_text("changed")
    changed = fingerprint(data_config(moved))
    (moved / "second" / "20.txt").rename(moved / "second" / "20b.txt")
    assert len({before, changed, fingerprint(data_config(moved))}) == 3


def test_environment_and_home_are_expanded_in_the_path(data_config, text_folder, monkeypatch):
    monkeypatch.setenv("TEXTS", str(text_folder.parent))
    assert corpus_files(data_config("$TEXTS/texts")) == corpus_files(data_config(text_folder))
    monkeypatch.setenv("HOME", str(text_folder.parent))
    assert corpus_files(data_config("~/texts")) == corpus_files(data_config(text_folder))
