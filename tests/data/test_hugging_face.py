"""Data sets of the `datasets` library, made by it here: nothing is downloaded."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from eellm.data.corpus import prepare_corpus
from eellm.data.text import documents, fingerprint
from eellm.errors import DataError, MissingExtra
from tests.data.conftest import WORDS

TEXTS = [f"{' '.join(WORDS[number % 7 : number % 7 + 9])} number {number}" for number in range(60)]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The same texts as `datasets` saves and exports them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(len(TEXTS)))})
    folder = tmp_path / "made"
    rows.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(folder / "splits")
    (folder / "parquet").mkdir()
    rows.to_parquet(folder / "parquet" / "train.parquet")
    rows.select(range(5)).to_parquet(folder / "parquet" / "test.parquet")
    (folder / "lines").mkdir()
    rows.to_json(folder / "lines" / "train.jsonl")
    return folder


def texts(data) -> list[str]:
    return [text for _, text in documents(data)]


@pytest.mark.parametrize("place", ["saved", "splits", "parquet", "lines", "parquet/train.parquet", "lines/train.jsonl"])
def test_every_row_of_a_local_data_set_is_a_document(made, data_config, place):
    assert texts(data_config(made / place, source="huggingface")) == TEXTS


@pytest.mark.parametrize("place", ["splits", "parquet"])
def test_another_split_is_read(made, data_config, place):
    assert texts(data_config(made / place, source="huggingface", hf_split="test")) == TEXTS[:5]


def test_the_fingerprint_is_that_of_the_text(made, data_config):
    places = ("saved", "parquet", "lines/train.jsonl")
    assert len({fingerprint(data_config(made / place, source="huggingface")) for place in places}) == 1
    assert fingerprint(data_config(made / "splits", source="huggingface", hf_split="test")) != fingerprint(
        data_config(made / "splits", source="huggingface")
    )


def test_a_corpus_is_made_of_it_and_split_by_document(made, run_config):
    corpus = prepare_corpus(run_config(made / "parquet", source="huggingface"))
    assert corpus.num_documents == len(TEXTS)
    assert corpus.validation_samples > 0
    lines = prepare_corpus(run_config(made / "lines", source="huggingface"))
    assert lines == corpus


@pytest.mark.parametrize(
    ("place", "changes", "told"),
    [
        ("saved", {"text_field": "body"}, r"no column 'body'; there are \['id', 'text'\]. Set data.text_field"),
        ("saved", {"text_field": "id"}, r"row 0: 'id' is a int, not text"),
        ("splits", {"hf_split": "dev"}, r"cannot open it \(.*dev.*\). Check .* data.hf_split=dev"),
        ("parquet", {"hf_split": "dev"}, r"cannot open it \(.*dev.*\)"),
        ("nowhere", {}, r"nowhere: `datasets` cannot open it"),
    ],
)
def test_what_is_not_there_is_named(made, data_config, place, changes, told):
    with pytest.raises(DataError, match=told):
        texts(data_config(made / place, source="huggingface", **changes))


def test_a_missing_package_is_named_with_its_extra(data_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"needs datasets.*eellm\[hf\]"):
        texts(data_config(tmp_path, source="huggingface"))


def test_gzipped_lines_are_lines(data_config, tmp_path: Path):
    content = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
    (tmp_path / "plain.jsonl").write_bytes(content)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(content))
    plain, packed = (data_config(tmp_path / name, source="jsonl") for name in ("plain.jsonl", "packed.jsonl.gz"))
    assert texts(packed) == texts(plain) == TEXTS
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: not a whole gzip file after line \d+"):
        texts(data_config(tmp_path / "cut.jsonl.gz", source="jsonl"))
