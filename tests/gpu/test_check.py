"""The GPU script runs: its sections at a small scale on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import workers
from tests.gpu import check
from tests.gpu.executor import compare
from tests.gpu.timing import SCALES


def run_section(rank: int, name: str) -> None:
    """In a worker, whose own process group makes way for the script's."""
    import torch.distributed as dist

    dist.destroy_process_group()
    check.main(["--device", "cpu", "--only", name])


def executor_on(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
    compare(rank, "cpu", SCALES["cpu"], folder)


@pytest.mark.parametrize("name", [name for name in check.SECTIONS if name != "executor"])
def test_sections_run(name: str) -> None:
    workers.run(1, run_section, name)


def test_the_executor_is_compared(tmp_path: Path) -> None:
    """The ranks that the section starts, as forked ones: starting Python takes longer than comparing."""
    workers.run(2, executor_on, str(tmp_path))
    for rank in range(2):
        number, *times, difference = (tmp_path / f"rank_{rank}").read_text().split("\t")
        assert int(number) == rank
        assert all(float(took) > 0 for took in times)
        assert float(difference) < 1e-6
