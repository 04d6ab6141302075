"""`python run.py task=serve`: asked to end, and with a rank that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving.service import PROMPTS

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def started(run: Path, *overrides: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its address."""
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "task=serve",
        "serve.port=0",
        "device=cpu",
        f"hydra.run.dir={run}",
        *overrides,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        found = re.search(r"http://[\d.:]+", process.stdout.readline())
        assert found, process.stderr.read()
        yield process, found.group()
    finally:
        process.kill()
        process.wait()


def test_a_signal_lets_what_runs_finish_and_refuses_the_rest(tmp_path: Path) -> None:
    run, secret = tmp_path / "run", "sesame_street"
    limits = ("decoding.max_batch=2", "decoding.max_tokens=2000", "serve.max_new_tokens=2000", "serve.decodings=[catch_up]")
    with started(run, *limits) as (process, url), ThreadPoolExecutor(3) as pool, httpx.Client(base_url=url, timeout=60) as client:
        body = {"prompt": f"# {secret}\n", "max_tokens": 600, "exit_threshold": 1.0}
        running = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(2)]
        wait_for(lambda: client.get("/health").json()["running"] == 2)
        waiting = pool.submit(client.post, "/v1/completions", json=body)
        wait_for(lambda: client.get("/health").json()["queued"] == 1)
        process.send_signal(signal.SIGTERM)
        refused = waiting.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json=body).json()["error"]["code"] == "shutting_down"
        for answer in (future.result() for future in running):
            assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 600)
        assert process.wait(20) == 128 + signal.SIGTERM
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"
    lines = (run / "access.jsonl").read_text()
    assert secret not in lines
    outcomes = [json.loads(line).get("outcome") for line in lines.splitlines()]
    assert sorted(outcomes) == ["done", "done", "refused", "refused"]


@pytest.mark.dist
@pytest.mark.parametrize(("how", "said"), [(signal.SIGKILL, "killed by SIGKILL"), (signal.SIGSTOP, "Timed out")])
def test_a_rank_that_dies_or_stands_still_ends_the_service(how: signal.Signals, said: str, tmp_path: Path) -> None:
    run, layout = tmp_path / "run", ("parallel=tp2", "parallel.sequence_parallel=false")
    with started(run, *layout, "serve.decodings=[catch_up]", "serve.rank_timeout=15") as (process, url):
        body = {"prompt": PROMPTS[1], "max_tokens": 8}
        assert httpx.post(url + "/v1/completions", json=body, timeout=60).status_code == 200
        ranks = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        assert len(ranks) == 2
        port = int(url.rpartition(":")[2])
        (victim,) = (rank for rank in ranks if port not in {end.laddr.port for end in rank.net_connections("tcp")})
        os.kill(victim.pid, how)
        assert process.wait(40) == 1
        assert said in process.stderr.read()
        assert not victim.is_running()
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


def wait_for(reached) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)
