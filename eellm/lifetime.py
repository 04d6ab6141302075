"""Processes that end with the process that started them, even where that is killed."""

from __future__ import annotations

import os
import threading
import time

_POLL = 0.5
"""Seconds between two looks at the parent."""


def end_with_parent(parent: int) -> None:
    """End this process when `parent`, its process id, is gone: nobody would watch it, and what it holds open hides the death."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()
