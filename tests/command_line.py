"""`python run.py ...` as a user runs it, but for the seconds that importing takes: in forked processes.

Python itself is started where that, signals or the environment at import are what is tested: tests/test_run.py, test_readme.py,
faults, serving, harness.
"""

from __future__ import annotations

import atexit
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.forking import ROOT, fork

TIMEOUT = 280.0


def run_py(
    *overrides: str, cwd: Path = ROOT, ranks: int = 1, succeed: bool = True, largest_file: int | None = None
) -> subprocess.CompletedProcess[str]:
    """What the command printed, that of rank 0 first. Fails the test unless it ends as it should.

    `ranks`: how many processes run it, as under torchrun; where it is 1, the command starts the ranks of its layout itself.
    `largest_file`: bytes after which the system refuses to write, as a full disk does.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"out_{rank}"), Path(folder, f"err_{rank}")) for rank in range(ranks)]
        processes = [
            fork(_command, overrides, cwd, environment, largest_file, *files)
            for environment, files in zip(environments(ranks), outputs, strict=True)
        ]
        deadline = time.monotonic() + TIMEOUT
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
        out, err = ("".join(path.read_text() for path in stream if path.exists()) for stream in zip(*outputs, strict=True))
    said = out[-3000:] + err[-3000:]
    assert not late, f"still running after {TIMEOUT} s:\n{said}"
    assert [process.exitcode == 0 for process in processes] == [succeed] * ranks, said
    return subprocess.CompletedProcess(overrides, processes[0].exitcode or 0, out, err)


def environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun would tell each of the ranks, besides this process's own environment."""
    if ranks == 1:
        return [dict(os.environ)]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    told = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{**os.environ, **{name: str(value) for name, value in own.items()}} for own in told]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def _command(
    overrides: Sequence[str], cwd: Path, environment: dict[str, str], largest_file: int | None, out: Path, err: Path
) -> None:
    """In the forked process: what Python's start does for a script."""
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))  # handed down to every process
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(ROOT / "run.py"), *overrides]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves without them
