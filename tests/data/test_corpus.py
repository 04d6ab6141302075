from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from eellm.data import corpus as module
from eellm.data import stored
from eellm.data.corpus import Corpus, prepare_corpus
from eellm.data.text import documents
from eellm.data.tokenizer_files import load_tokenizer, prepare_tokenizer
from eellm.errors import DataError
from eellm.mcore.datasets import open_documents, write_documents


def contents(corpus: Corpus) -> list[list[int]]:
    return [tokens.tolist() for tokens in open_documents(Path(corpus.parts[0].prefix))]


def test_stored_documents_are_the_encoded_texts(run_config, text_folder):
    config = run_config(text_folder)
    corpus = prepare_corpus(config)
    tokenizer = load_tokenizer(corpus.tokenizer)
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for _, text in documents(config.data)]
    assert contents(corpus) == expected
    assert (corpus.num_documents, corpus.num_tokens) == (len(expected), sum(map(len, expected)))
    assert (corpus.vocab_size, corpus.eod_id) == (tokenizer.vocab_size, tokenizer.eod_id)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (70000, np.int32)])
def test_token_type_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    texts = [np.array([vocab_size - 1, 0, 5]), np.array([1]), np.arange(100)]
    write_documents(tmp_path / "tokens", iter(texts), vocab_size)
    stored = open_documents(tmp_path / "tokens")
    assert [tokens.tolist() for tokens in stored] == [tokens.tolist() for tokens in texts]
    assert stored[0].dtype == dtype


def test_windows_are_the_stream_of_their_documents(run_config, text_folder):
    corpus = prepare_corpus(run_config(text_folder))
    texts = contents(corpus)
    length = corpus.sequence_length
    for split in ("train", "validation"):
        numbers = np.load(Path(corpus.parts[0].windows) / f"{split}.npy").astype(np.int32)
        # the documents' order inside the stream is megatron-core's: shuffled by a legacy generator with seed 0
        np.random.RandomState(0).shuffle(numbers)
        stream = [token for number in numbers for token in texts[number]]
        count = (len(stream) - 1) // length
        expected = [stream[place * length : (place + 1) * length + 1] for place in range(count)]
        windows = corpus.open(split)
        found = [[*window["tokens"].tolist(), window["labels"][-1].item()] for window in windows]
        assert sorted(found) == sorted(expected)
        for window in windows:
            assert window["labels"][:-1].tolist() == window["tokens"][1:].tolist()
            assert window["loss_mask"].tolist() == [1.0] * length
        assert len(windows) == count == {"train": corpus.train_samples, "validation": corpus.validation_samples}[split]


def test_no_document_is_on_both_sides(run_config, text_folder):
    corpus = prepare_corpus(run_config(text_folder))
    texts = contents(corpus)
    train, validation = (np.load(Path(corpus.parts[0].windows) / f"{split}.npy") for split in ("train", "validation"))
    assert sorted([*train, *validation]) == list(range(len(texts)))
    assert (len(train), len(validation)) == (corpus.parts[0].train_documents, corpus.parts[0].validation_documents)
    assert not {tuple(texts[number]) for number in train} & {tuple(texts[number]) for number in validation}
    assert (sum(len(texts[number]) for number in train), sum(len(texts[number]) for number in validation)) == (
        corpus.train_tokens,
        corpus.validation_tokens,
    )


def test_second_call_finds_everything_whatever_the_seed(run_config, text_folder, monkeypatch):
    first = prepare_corpus(run_config(text_folder))

    def fail(*_: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(stored, "_tokenise", fail)
    monkeypatch.setattr(module, "_index", fail)
    begin = time.perf_counter()
    assert prepare_corpus(run_config(text_folder, seed=2)) == first
    assert time.perf_counter() - begin < 1


def test_split_and_length_reuse_the_tokens(run_config, text_folder, monkeypatch):
    first = prepare_corpus(run_config(text_folder))
    monkeypatch.setattr(stored, "_tokenise", None)
    longer = prepare_corpus(run_config(text_folder, sequence_length=32))
    other = prepare_corpus(run_config(text_folder, split=[0.5, 0.5]))
    assert first.parts[0].prefix == longer.parts[0].prefix == other.parts[0].prefix
    assert len({first.parts[0].windows, longer.parts[0].windows, other.parts[0].windows}) == 3
    assert len(longer.open("train")[0]["tokens"]) == 32
    assert first.validation_tokens == longer.validation_tokens < other.validation_tokens


def test_a_file_of_the_trained_tokenizer_finds_the_same_tokens(run_config, text_folder, tokenizer_config, tmp_path):
    config = run_config(text_folder)
    first = prepare_corpus(config)
    prepare_tokenizer(config.data, tokenizer_config)[0].save(tmp_path / "copy.json")
    from_file = tokenizer_config.model_copy(update={"kind": "file", "path": str(tmp_path / "copy.json")})
    assert prepare_corpus(config.model_copy(update={"tokenizer": from_file})).parts[0].prefix == first.parts[0].prefix


def test_changed_text_is_another_corpus(run_config, text_folder):
    first = prepare_corpus(run_config(text_folder))
    (text_folder / "first" / "00.txt").write_text("changed " * 50)
    second = prepare_corpus(run_config(text_folder))
    assert first.fingerprint != second.fingerprint
    assert first.parts[0].prefix != second.parts[0].prefix


def test_corpus_survives_a_json_file_and_a_moved_cache(run_config, text_folder, tmp_path):
    config = run_config(text_folder)
    corpus = prepare_corpus(config)
    corpus.save(tmp_path / "corpus.json")
    assert Corpus.load(tmp_path / "corpus.json") == corpus
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    data = config.data.model_copy(update={"cache_dir": str(tmp_path / "moved")})
    moved = prepare_corpus(config.model_copy(update={"data": data}))
    before = sorted(path.name for path in Path(moved.parts[0].windows).iterdir())
    assert moved.open("train")[0]["tokens"].shape == (16,)
    assert sorted(path.name for path in Path(moved.parts[0].windows).iterdir()) == before


def test_nothing_held_out_is_allowed_until_it_is_asked_for(run_config, text_folder):
    corpus = prepare_corpus(run_config(text_folder, split=[1.0, 0.0]))
    assert (corpus.parts[0].validation_documents, corpus.validation_samples) == (0, 0)
    with pytest.raises(DataError, match="no document is held out"):
        corpus.open("validation")


@pytest.mark.parametrize(("split", "which"), [([0.99, 0.01], "validation"), ([0.01, 0.99], "train")])
def test_too_small_a_split_is_refused_with_numbers(run_config, text_folder, split, which):
    with pytest.raises(DataError) as error:
        prepare_corpus(run_config(text_folder, split=split, sequence_length=4000))
    assert f"the {which} split has " in str(error.value)
    assert "data.sequence_length=4000 needs at least 4001" in str(error.value)
    # the refused folder must not be taken for a finished one
    with pytest.raises(DataError, match="needs at least 4001"):
        prepare_corpus(run_config(text_folder, split=split, sequence_length=4000))


@pytest.mark.parametrize("split", [[0.8, 0.1, 0.1], [], [0.0, 0.0]])
def test_meaningless_splits_are_refused(run_config, text_folder, split):
    with pytest.raises(DataError, match=r"data\.split"):
        prepare_corpus(run_config(text_folder, split=split))


def test_too_small_a_model_vocabulary_is_refused(run_config, text_folder):
    config = run_config(text_folder)
    small = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 200})})
    with pytest.raises(DataError, match=r"model\.vocab_size=200: the tokenizer has 300 entries"):
        prepare_corpus(small)


def test_a_lost_cache_is_an_error_for_the_user(run_config, text_folder):
    corpus = prepare_corpus(run_config(text_folder))
    for path in Path(corpus.parts[0].windows).glob("*-valid-*"):
        path.unlink()
    with pytest.raises(DataError, match="Prepare the corpus again"):
        corpus.open("validation")
    Path(f"{corpus.parts[0].prefix}.bin").unlink()
    with pytest.raises(DataError, match="Prepare the corpus again"):
        corpus.open("train")


def test_a_single_file_is_split_too(run_config, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"paragraph {number} of the book" for number in range(4000)))
    corpus = prepare_corpus(run_config(path))
    assert corpus.parts[0].validation_documents >= 1
    assert corpus.parts[0].train_documents >= 1
