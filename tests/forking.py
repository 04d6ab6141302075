"""Processes that have imported torch, megatron-core and Lightning before they begin: forked from one server that has."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def fork(function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Start a process that calls the function and ends with this one, even where this one is killed."""
    with contextlib.chdir(ROOT):  # where the server is started, it finds `tests`
        process = CONTEXT.Process(target=_call, args=(function, args))
        process.start()
    return process


def _call(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    function(*args)
