from __future__ import annotations

import numpy as np
import pytest

from eellm.data.split import split_documents


def corpus(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 2**63, count, dtype=np.uint64), rng.integers(1, 1000, count)


def test_every_document_is_on_one_side_and_the_share_is_met():
    hashes, lengths = corpus(1000)
    train, validation = split_documents(hashes, lengths, 0.1)
    assert sorted([*train, *validation]) == list(range(1000))
    assert abs(lengths[validation].sum() - 0.1 * lengths.sum()) <= 500
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()


def test_held_out_documents_are_spread_over_the_corpus():
    hashes, lengths = corpus(1000)
    _, validation = split_documents(hashes, lengths, 0.1)
    counts = np.histogram(validation, bins=5, range=(0, 1000))[0]
    # about 20 of 200 expected in each fifth; the bounds are 4 standard deviations
    assert (counts >= 4).all()
    assert (counts <= 37).all()


def test_split_depends_on_content_not_on_order():
    hashes, lengths = corpus(300)
    shuffled = np.random.default_rng(1).permutation(300)
    _, validation = split_documents(hashes, lengths, 0.1)
    _, of_shuffled = split_documents(hashes[shuffled], lengths[shuffled], 0.1)
    assert set(hashes[validation]) == set(hashes[shuffled][of_shuffled])


def test_equal_texts_stay_together():
    hashes, _ = corpus(40)
    hashes = np.concatenate([hashes] * 5)
    for share in (0.05, 0.3, 0.5, 0.77):
        train, validation = split_documents(hashes, np.full(200, 10), share)
        assert not set(hashes[train]) & set(hashes[validation])
        assert abs(len(validation) - share * 200) <= 2.5


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (0.001, 1), (0.999, 2), (1.0, 3)])
def test_both_sides_get_a_document_where_both_are_wanted(share, held_out):
    train, validation = split_documents(np.array([5, 9, 2], dtype=np.uint64), np.array([10, 10, 10]), share)
    assert (len(train), len(validation)) == (3 - held_out, held_out)


def test_one_document_trains():
    train, validation = split_documents(np.array([5], dtype=np.uint64), np.array([10]), 0.1)
    assert (train.tolist(), validation.tolist()) == ([0], [])
