from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eellm.data.cache import cache_root, new_folder, write_atomically
from eellm.errors import DataError, WriteError
from eellm.metrics.file_sinks import JsonlSink
from eellm.metrics.rows import read_rows


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


@pytest.mark.parametrize("place", ["below_a_file", "read_only"])
def test_what_cannot_be_written_is_named(place: str, tmp_path: Path) -> None:
    """Also for root, whom permissions do not stop."""
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "below" if place == "below_a_file" else Path("/proc/eellm")
    with pytest.raises(WriteError, match=rf"cannot write {where}/status\.json: .+\."):
        write_atomically(where / "status.json", "{}")
    with pytest.raises(WriteError, match=rf"cannot write {where}/corpus: .+\."), new_folder(where / "corpus"):
        pytest.fail("there is nothing to fill")
    with pytest.raises(WriteError, match=rf"cannot write {where}/metrics\.jsonl: .+\."):
        JsonlSink(where / "metrics.jsonl")


LIMITED = """
import resource, sys
from pathlib import Path
from eellm.data.cache import new_folder, write_atomically
from eellm.errors import WriteError
from eellm.metrics.file_sinks import CsvSink, JsonlSink
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
folder = Path(sys.argv[1])

def filled():
    with new_folder(folder / "corpus") as temporary:
        (temporary / "tokens.bin").write_bytes(bytes(2000))

def log(sink):
    for step in range(100):
        sink.log({"step": step, "time": 0.0, "loss": 0.5})

for action in (
    lambda: write_atomically(folder / "status.json", "x" * 2000),
    filled,
    lambda: log(JsonlSink(folder / "metrics.jsonl")),
    lambda: log(CsvSink(folder / "metrics.csv")),
):
    try:
        action()
    except WriteError as error:
        print(error)
"""


def test_a_full_disk_is_a_users_error(tmp_path: Path) -> None:
    write_atomically(tmp_path / "status.json", "before")
    said = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    names = ("status.json", "corpus", "metrics.jsonl", "metrics.csv")
    assert said.splitlines() == [f"cannot write {tmp_path / name}: File too large." for name in names]
    assert (tmp_path / "status.json").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl", "status.json"], (
        "nothing half-made"
    )
    size = len((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) + 1
    rows = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert rows == list(range(len(rows))), "what was written before stays readable"
    assert len(rows) > 900 // (size + 1)
