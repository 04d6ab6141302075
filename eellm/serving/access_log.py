"""access.jsonl: one line for each request, saying what happened to it, without its text."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from eellm.serving.job import Finish, Job


class Entry:
    """What is known about a request so far; `outcome` is `done`, `refused`, `failed` or `client left`."""

    def __init__(self, client: str, method: str, path: str):
        self.started = time.monotonic()
        self.fields: dict[str, Any] = {"client": client, "method": method, "path": path[:200]}
        self.jobs: Sequence[Job] = ()
        self.ends: dict[int, Finish] = {}

    def row(self) -> dict[str, Any]:
        row = {"time": time.time(), **self.fields, "seconds": round(time.monotonic() - self.started, 4)}
        if not self.jobs:
            return row
        first = self.jobs[0]
        row |= {"decoding": first.mode, "thresholds": first.request.policy.thresholds if first.request.policy else None}
        row |= {"choices": len(self.jobs), "prompt_tokens": sum(len(job.ids) for job in self.jobs)}
        row |= {"completion_tokens": sum(job.generated for job in self.jobs)}
        row |= {"finish": [end.reason for _, end in sorted(self.ends.items())]}
        waits = [job.admitted - job.submitted for job in self.jobs if job.admitted is not None]
        firsts = [job.first_token - job.submitted for job in self.jobs if job.first_token is not None]
        row |= {"queue_seconds": round(statistics.mean(waits), 4) if waits else None}
        return row | {"first_token_seconds": round(min(firsts), 4) if firsts else None}


class AccessLog:
    """A full disk costs lines, not answers: `lost` counts them."""

    def __init__(self, path: Path):
        self.lost = 0
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, entry: Entry) -> None:
        try:
            self._file.write(json.dumps(entry.row(), ensure_ascii=False) + "\n")
        except OSError:
            self.lost += 1

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
