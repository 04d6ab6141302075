from __future__ import annotations

import pytest
import torch

from eellm.decoding.model.kv_cache import KVCache, KVShape, NextPlaces


def rows(count: int, start: int) -> torch.Tensor:
    """Keys and values [count, 2, 2, 3] that say which position they are of."""
    key = torch.arange(start, start + count).float().reshape(-1, 1, 1).expand(-1, 2, 3)
    return torch.stack((key, -key), 2)


def test_layers_fill_on_their_own_and_in_order() -> None:
    cache = KVCache(["1", "exit_01"], KVShape(max_tokens=5, groups=2, head_dim=3))
    cache.append("1", 0, rows(2, 0))
    keys, values = cache.append("1", 0, rows(3, 2))
    assert keys[1, :, 2].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(values, -keys)
    keys, _ = cache.append("exit_01", 0, rows(1, 0))
    assert keys.shape == (2, 1, 3)
    assert (cache.filled("1"), cache.filled("exit_01")) == (5, 1)
    cache.truncate(3)
    assert (cache.filled("1"), cache.filled("exit_01")) == (3, 1)
    keys, _ = cache.append("1", 0, rows(1, 9))
    assert keys[0, :, 0].tolist() == [0, 1, 2, 9]
    assert torch.equal(cache.read("1")[0], keys)


def test_sequences_have_slots_of_their_own() -> None:
    cache = KVCache(["1"], KVShape(max_tokens=6, groups=2, head_dim=3, sequences=3))
    cache.append("1", 2, rows(4, 10))
    cache.append("1", 0, rows(1, 20))
    keys, values = cache.append_each("1", NextPlaces([2, 0], [4, 1], [1, 1], "cpu"), torch.cat((rows(1, 14), rows(1, 21))))
    assert keys.shape == (2, 2, 5, 3)
    assert keys[0, 0, :, 0].tolist() == [10, 11, 12, 13, 14]
    assert keys[1, 0, :2, 0].tolist() == [20, 21]
    assert torch.isfinite(keys).all()
    assert torch.equal(values, -keys)
    assert [cache.filled("1", slot) for slot in range(3)] == [2, 0, 5]
    cache.truncate(1, 2)
    assert [cache.filled("1", slot) for slot in range(3)] == [2, 0, 1]
    assert cache.read("1", 0)[0][0, :, 0].tolist() == [20, 21]


def test_slots_that_follow_each_other_are_read_where_they_are() -> None:
    cache = KVCache(["1"], KVShape(max_tokens=3, groups=2, head_dim=3, sequences=4))
    cache.append("1", 1, rows(2, 5))
    keys, values = cache.append_each("1", NextPlaces([1, 2, 3], [2, 0, 0], [1, 1, 1], "cpu"), rows(3, 7))
    assert keys[:, 1, :, 2].tolist() == [[5, 6, 7], [8, 0, 0], [9, 0, 0]]
    assert torch.equal(values, -keys)
    assert keys.untyped_storage().data_ptr() == cache.read("1")[0].untyped_storage().data_ptr()


def test_overflow_is_refused_with_its_numbers_and_changes_nothing() -> None:
    cache = KVCache(["7"], KVShape(max_tokens=4, groups=2, head_dim=3))
    cache.append("7", 0, rows(3, 0))
    with pytest.raises(ValueError, match="layer 7 holds 4 tokens: 3 are filled, 2 more do not fit"):
        cache.append("7", 0, rows(2, 3))
    assert cache.filled("7") == 3


def test_memory_is_counted() -> None:
    shape = KVShape(max_tokens=10, groups=2, head_dim=3, dtype=torch.bfloat16, sequences=4)
    assert KVCache(["1", "2", "3"], shape).memory_bytes == 3 * 2 * 10 * 4 * 2 * 3 * 2
