"""Runs on forked ranks: a server over several ranks, and one whose other rank falls silent."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import httpx

from eellm.decoding.pipeline.follower import Follower
from eellm.mcore.groups import init_groups, pick_device
from eellm.model.spec import tied_stages
from eellm.serving.server import address_of, listen
from eellm.tasks.context import TaskContext
from eellm.tasks.serve import serve
from eellm.tasks.session import Plan
from eellm.tasks.source import trained_tokenizer
from eellm.tasks.trained import load_trained
from tests.serving.service import config_of


def answers_of_ranks(rank: int, overrides: list[str], folder: Path, asked: list[dict]) -> list[dict]:
    """What rank 0 answers to requests that come at the same time; then it is asked to end."""
    end, answers = threading.Event(), []

    def ask(url: str) -> None:
        try:
            with ThreadPoolExecutor(len(asked)) as pool:
                answers.extend(pool.map(lambda body: httpx.post(f"{url}/v1/completions", json=body, timeout=60).json(), asked))
        finally:
            end.set()

    _serve(rank, overrides, folder, end, ask)
    return answers


def failure_of_a_silent_rank(rank: int, overrides: list[str], folder: Path, seconds: float) -> tuple[str, int, float]:
    """Rank 1 is there and does nothing: how rank 0's service ends, what its client is told, and after how many seconds."""
    statuses: list[int] = []

    def ask(url: str) -> None:
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x = ", "max_tokens": 200}, timeout=60)
        statuses.append(answer.status_code)

    began = time.monotonic()
    try:
        with patch.object(Follower, "follow", lambda _: time.sleep(seconds)) if rank > 0 else nullcontext():
            _serve(rank, overrides, folder, threading.Event(), ask)
    except Exception as error:
        return type(error).__name__, statuses[0], time.monotonic() - began
    return "", 0, 0.0


def _serve(rank: int, overrides: list[str], folder: Path, end: threading.Event, ask) -> None:
    config = config_of(*overrides)
    plan = Plan.of(config, trained_tokenizer(config).vocab_size)
    minutes = config.serve.rank_timeout / 60
    groups = init_groups(plan.layout, pick_device("cpu"), tied_stages(plan.spec, plan.stages), timeout_minutes=minutes)
    stage = load_trained(config, plan, groups).stages[0]
    listener = listen("127.0.0.1", 0) if rank == 0 else None
    asking = threading.Thread(target=ask, args=(address_of(listener),)) if listener else None
    if asking:
        asking.start()
    try:
        serve(TaskContext(config, folder), stage, groups, listener, end.is_set)
    finally:
        if asking:
            asking.join(30)
