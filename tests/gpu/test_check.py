"""The GPU script runs: its sections at a small scale on the CPU."""

from __future__ import annotations

import pytest

from tests import workers
from tests.gpu import check


def run_section(rank: int, name: str) -> None:
    """In a worker, whose own process group makes way for the script's."""
    import torch.distributed as dist

    dist.destroy_process_group()
    check.main(["--device", "cpu", "--only", name])


@pytest.mark.parametrize("name", check.SECTIONS)
def test_sections_run(name: str) -> None:
    workers.run(1, run_section, name)
