"""Tokens in Megatron's own files: read as they are, split, blended, and refused where they are wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from eellm.config.schema import TokenizerConfig
from eellm.data.batch import GlobalBatch
from eellm.data.batches import GlobalBatches, training_batches, validation_batches
from eellm.data.corpus import Corpus, prepare_corpus
from eellm.data.tokenizer_files import load_tokenizer
from eellm.errors import DataError
from eellm.layout import ParallelLayout
from eellm.mcore.datasets import open_documents
from tests.data.tokens import EOD, VOCABULARY, random_documents, write_pair, write_tokenizer


@pytest.fixture
def tokens_config(run_config, tmp_path):
    """Builds a config for prefixes; their tokenizer has 100 entries and ends documents with 0."""
    tokenizer = TokenizerConfig(
        kind="file",
        vocab_size=None,
        path=str(write_tokenizer(tmp_path / "tokenizer.json")),
        end_of_document=None,
        train_megabytes=1.0,
    )

    def build(*prefixes: Path, **changes: object):
        path = str(prefixes[0]) if len(prefixes) == 1 else list(map(str, prefixes))
        config = run_config(None, **{"source": "megatron", "split": [0.7, 0.3]} | changes)
        data = config.data.model_copy(update={"path": path})
        return config.model_copy(update={"data": data, "tokenizer": tokenizer})

    return build


@pytest.fixture
def three(tmp_path):
    """Three pairs whose ids tell them apart, a document in common between the first and the second."""
    documents = [random_documents(number, 40, low=1 + 30 * number, high=31 + 30 * number) for number in range(3)]
    documents[1] += documents[0][:5]
    return [write_pair(tmp_path / "pairs" / name, part) for name, part in zip("abc", documents, strict=True)], documents


def flat(documents) -> list[tuple[int, ...]]:
    return [tuple(token for sentence in document for token in sentence) for document in documents]


def sides(corpus: Corpus, split: str) -> list[list[tuple[int, ...]]]:
    """Documents of a split, by part."""
    found = []
    for part in corpus.parts:
        stored, numbers = open_documents(Path(part.prefix)), np.load(Path(part.windows) / f"{split}.npy")
        found.append([tuple(stored[int(number)].tolist()) for number in numbers])
    return found


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_windows_are_cut_from_the_stored_tokens(tokens_config, tmp_path, dtype):
    documents = random_documents(0, 30)
    prefix = write_pair(tmp_path / "corpus_text_document", documents, dtype)
    corpus = prepare_corpus(tokens_config(prefix, split=[1.0, 0.0]))
    texts = flat(documents)
    assert corpus.parts[0].prefix == str(prefix)
    assert (corpus.num_documents, corpus.num_tokens, corpus.eod_id) == (30, sum(map(len, texts)), EOD)
    numbers = np.arange(30, dtype=np.int32)
    np.random.RandomState(0).shuffle(numbers)
    stream = [token for number in numbers for token in texts[number]]
    windows = corpus.open("train")
    found = sorted([*window["tokens"].tolist(), window["labels"][-1].item()] for window in windows)
    assert found == sorted(stream[begin : begin + 17] for begin in range(0, len(windows) * 16, 16))


def test_documents_stored_by_sentence_are_read_whole_and_empty_ones_left_out(tmp_path):
    documents = [[[1, 2], [3], [4, 0]], [], [[5, 0]], [[]], [[6], [7, 8, 0]]]
    stored = open_documents(write_pair(tmp_path / "sentences", documents))
    assert [ids.tolist() for ids in stored] == [[1, 2, 3, 4, 0], [5, 0], [6, 7, 8, 0]]
    assert stored.get(2, offset=1, length=2).tolist() == [7, 8]


def test_equal_documents_stay_on_one_side_in_all_parts(tokens_config, three):
    prefixes, documents = three
    corpus = prepare_corpus(tokens_config(*prefixes))
    train, held_out = sides(corpus, "train"), sides(corpus, "validation")
    assert not {text for part in train for text in part} & {text for part in held_out for text in part}
    for own, *found in zip(documents, train, held_out, strict=True):
        assert sorted(flat(own)) == sorted(found[0] + found[1])
        assert found[0]
        assert found[1]
    # the common documents were there to be torn apart: on both sides there are some
    common = set(flat(documents[0][:5]))
    assert common <= set(train[1] + held_out[1])


def test_no_token_of_a_window_comes_from_the_other_side(tokens_config, three):
    """Ids that stand only in held-out documents must not be seen in training, nor the other way round."""
    prefix = write_pair(three[0][0].with_name("unique"), [[[number, number, number, EOD]] for number in range(1, 100)])
    corpus = prepare_corpus(tokens_config(prefix))
    seen = {
        split: {int(token) for window in corpus.open(split) for token in window["tokens"]} for split in ("train", "validation")
    }
    assert len(seen["train"]) > 50
    assert len(seen["validation"]) > 20
    assert seen["train"] & seen["validation"] == {EOD}


def test_held_out_prefixes_are_held_out_and_their_documents_not_trained_on(tokens_config, three, caplog):
    (first, second, third), documents = three
    with caplog.at_level(logging.WARNING):
        corpus = prepare_corpus(tokens_config(second, third, validation_path=str(first)))
    train, held_out = sides(corpus, "train"), sides(corpus, "validation")
    assert sorted(held_out[2]) == sorted(flat(documents[0]))
    assert sorted(train[0]) == sorted(flat(documents[1][:-5]))
    assert sorted(train[1]) == sorted(flat(documents[2]))
    assert "5 documents of data.path are in data.validation_path too" in caplog.text


def drawn(batches: GlobalBatches, steps: int) -> list[list[int]]:
    """Every step's windows in the order of their sample numbers."""
    found = []
    for step in range(steps):
        found.append([row for _, row in sorted(samples(batches.batch(step)))])
    return found


def samples(batch: GlobalBatch) -> list[tuple[int, list[int]]]:
    return list(zip(batch.sample_ids.flatten().tolist(), batch.tokens.flatten(0, 1).tolist(), strict=True))


def part_of(row: list[int]) -> int:
    return (next(token for token in row if token != EOD) - 1) // 30


def test_a_blend_has_the_weights_shares_on_all_layouts_and_after_a_resume(tokens_config, tmp_path):
    documents = [random_documents(number, 40, low=1 + 30 * number, high=31 + 30 * number) for number in range(3)]
    prefixes = [write_pair(tmp_path / name, part) for name, part in zip("abc", documents, strict=True)]
    config = tokens_config(*prefixes, weights=[0.5, 0.375, 0.125])
    corpus = prepare_corpus(config)
    one = ParallelLayout(micro_batch_size=2, global_batch_size=8)
    expected = drawn(training_batches(config, corpus, one, 0, 0), 30)
    for step in expected:
        assert sorted(map(part_of, step)) == [0] * 4 + [1] * 3 + [2]
    ranks = [ParallelLayout(dp=2, micro_batch_size=1, global_batch_size=8)] * 2
    halves = [training_batches(config, corpus, layout, rank, 0) for rank, layout in enumerate(ranks)]
    for step in range(3):
        both = [batches.batch(step) for batches in halves]
        rows = [pair for batch in both for pair in samples(batch)]
        assert [row for _, row in sorted(rows)] == expected[step]
    assert drawn(training_batches(config, corpus, one, 0, 8 * 11), 4) == expected[11:15]
    other = config.model_copy(update={"seed": 2})
    reseeded = drawn(training_batches(other, corpus, one, 0, 0), 30)
    assert reseeded != expected
    assert [list(map(part_of, step)) for step in reseeded] == [list(map(part_of, step)) for step in expected]


def test_a_blend_without_weights_reads_every_window_once_an_epoch(tokens_config, three):
    config = tokens_config(*three[0])
    corpus = prepare_corpus(config)
    layout = ParallelLayout(micro_batch_size=1, global_batch_size=1)
    windows = corpus.open("train")
    assert len(windows) == corpus.train_samples
    found = [step[0] for step in drawn(training_batches(config, corpus, layout, 0, 0), corpus.train_samples)]
    assert sorted(found) == sorted(window["tokens"].tolist() for window in windows)


def test_validation_of_a_blend_reads_its_shares_and_nothing_twice(tokens_config, three):
    config = tokens_config(*three[0], weights=[0.5, 0.25, 0.25])
    corpus = prepare_corpus(config)
    layout = ParallelLayout(micro_batch_size=4, global_batch_size=4)
    batches = validation_batches(config, corpus, layout, 0, 10**6)
    steps = drawn(batches, batches.plan.num_batches)
    assert len(steps) == corpus.validation_samples // 4 >= 5
    rows = [tuple(row) for step in steps for row in step]
    assert len(set(rows)) == len(rows)
    windows = corpus.open("validation")
    sizes = np.cumsum([0, *corpus._windows("validation")])
    owner = {
        tuple(windows[index]["tokens"].tolist()): int(np.searchsorted(sizes, index, "right")) - 1 for index in range(len(windows))
    }
    for step in steps:
        assert sorted(owner[tuple(row)] for row in step) == [0, 0, 1, 2]


def test_an_id_beyond_the_vocabulary_is_named_with_file_and_document(tokens_config, tmp_path):
    documents = random_documents(0, 20)
    documents[13][0][2] = 54321
    prefix = write_pair(tmp_path / "large", documents)
    with pytest.raises(DataError, match=rf"large\.bin: document 13 holds the token id 54321, .* ends at {VOCABULARY - 1}\."):
        prepare_corpus(tokens_config(prefix))
    # the refused file must not be taken for a checked one
    with pytest.raises(DataError, match="document 13"):
        prepare_corpus(tokens_config(prefix))
    documents[13][0][2] = -3
    with pytest.raises(DataError, match="document 13 holds the token id -3"):
        prepare_corpus(tokens_config(write_pair(tmp_path / "negative", documents, np.int32)))


def test_tokens_too_narrow_for_the_vocabulary_are_refused(tokens_config, tmp_path):
    config = tokens_config(write_pair(tmp_path / "narrow", random_documents(0, 20)))
    path = str(write_tokenizer(tmp_path / "huge.json", 70_000))
    huge = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": path})})
    with pytest.raises(DataError, match=r"narrow\.bin: its uint16 tokens end at 65535, and the tokenizer has 70000 entries"):
        prepare_corpus(huge)
    wide = write_pair(tmp_path / "wide", random_documents(0, 20), np.int32)
    data = config.data.model_copy(update={"path": str(wide)})
    assert prepare_corpus(huge.model_copy(update={"data": data})).num_documents == 20


@pytest.mark.parametrize("boundaries", ["ignore", "loss", "reset"])
def test_documents_without_their_end_are_told_of(tokens_config, tmp_path, caplog, boundaries):
    documents = random_documents(0, 10) + random_documents(1, 7, end=False)
    config = tokens_config(write_pair(tmp_path / "endless", documents), document_boundaries=boundaries)
    told = r"endless: 7 of 17 documents do not end with the tokenizer's end-of-document token \(id 0\)"
    if boundaries == "ignore":
        with caplog.at_level(logging.WARNING):
            prepare_corpus(config)
        assert "7 of 17 documents do not end" in caplog.text
    else:
        with pytest.raises(DataError, match=f"{told}, and data.document_boundaries={boundaries}"):
            prepare_corpus(config)


def test_boundaries_of_ended_documents_are_found_in_windows(tokens_config, tmp_path):
    """Positions restart right after each end that the files hold, and no label crosses it."""
    documents = random_documents(0, 60)
    config = tokens_config(write_pair(tmp_path / "ended", documents), document_boundaries="reset")
    corpus = prepare_corpus(config)
    batch = training_batches(config, corpus, ParallelLayout(micro_batch_size=8, global_batch_size=8), 0, 0).batch(0)
    texts = flat(documents)
    whole = 0
    for row in range(8):
        tokens, positions = batch.tokens[0, row].tolist(), batch.positions[0, row].tolist()
        begins = [place for place, position in enumerate(positions) if position == 0]
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            piece = tuple(tokens[begin:end])
            assert any(piece == text[at : at + len(piece)] for text in texts for at in range(len(text)))
            whole += piece in texts
            mask = batch.loss_mask[0, row, begin:end].tolist()
            assert mask == [0.0 if token == EOD else 1.0 for token in piece]
    assert len({int(number) for number in batch.documents.flatten()}) > 1


def test_a_changed_file_is_checked_again(tokens_config, tmp_path):
    documents = random_documents(0, 20)
    first = prepare_corpus(tokens_config(write_pair(tmp_path / "pair", documents)))
    documents[3][0][0] = 99
    second = prepare_corpus(tokens_config(write_pair(tmp_path / "pair", documents)))
    assert first.fingerprint != second.fingerprint
    assert first.parts[0].windows != second.parts[0].windows


def test_the_tokenizer_beside_the_tokens_is_used(tokens_config, tokenizer_config, tmp_path):
    prefix = write_pair(tmp_path / "pair", random_documents(0, 20))
    config = tokens_config(prefix).model_copy(update={"tokenizer": tokenizer_config})
    with pytest.raises(DataError, match=r"there is no pair\.tokenizer\.json beside them\. Give tokenizer=file"):
        prepare_corpus(config)
    write_tokenizer(tmp_path / "pair.tokenizer.json")
    assert load_tokenizer(prepare_corpus(config).tokenizer).vocab_size == VOCABULARY
    other = write_pair(tmp_path / "other", random_documents(1, 20))
    write_tokenizer(tmp_path / "other.tokenizer.json", 50)
    with pytest.raises(DataError, match="made with different tokenizers"):
        prepare_corpus(tokens_config(prefix, other).model_copy(update={"tokenizer": tokenizer_config}))


def test_a_part_too_small_for_the_split_is_named(tokens_config, three, tmp_path):
    small = write_pair(tmp_path / "small", [[[5, 6, EOD]]])
    with pytest.raises(DataError, match=r"split of .*small has \d documents"):
        prepare_corpus(tokens_config(three[0][0], small))
