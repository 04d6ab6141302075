from __future__ import annotations

from pathlib import Path

import pytest

from eellm.data.cache import cache_root, new_folder, write_atomically
from eellm.errors import DataError


def test_cache_folder_expands_home_and_environment(data_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", "there")
    data = data_config().model_copy(update={"cache_dir": "~/$PLACE/cache"})
    assert cache_root(data) == tmp_path / "home" / "there" / "cache"
    assert cache_root(data).is_dir()


def test_unusable_cache_folder_is_named(data_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir=.*file/cache"):
        cache_root(data_config().model_copy(update={"cache_dir": str(tmp_path / "file" / "cache")}))


def test_folder_appears_whole_and_the_first_one_stays(tmp_path):
    final = tmp_path / "corpora" / "key"
    with new_folder(final) as slow:
        (slow / "data").write_text("slow")
        with new_folder(final) as fast:
            (fast / "data").write_text("fast")
            assert not final.exists()
        assert (final / "data").read_text() == "fast"
    assert (final / "data").read_text() == "fast"
    assert list(final.parent.iterdir()) == [final]


def test_failed_folder_leaves_nothing(tmp_path):
    def fill() -> None:
        with new_folder(tmp_path / "key") as folder:
            (folder / "half").write_text("")
            raise DataError("stop")

    with pytest.raises(DataError, match="stop"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_atomic_file_replaces_and_leaves_no_rest(tmp_path):
    path: Path = tmp_path / "folder" / "file.json"
    write_atomically(path, "old")
    write_atomically(path, "new 日本")
    assert path.read_text(encoding="utf-8") == "new 日本"
    assert list(path.parent.iterdir()) == [path]
