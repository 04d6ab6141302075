"""What /metrics tells: tokens, exits, queue and times, in Prometheus' form."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from eellm.decoding.continuation import Token
from eellm.model.spec import ModelSpec
from eellm.serving.job import Job

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_WINDOW = 10.0
"""Seconds over which the current speed is taken."""


class Statistics:
    """Counts since the server was started. Observations come from the engine's thread and the server's."""

    def __init__(self, spec: ModelSpec):
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry, "namespace": "eellm"}
        self.tokens = Counter("tokens", "Generated tokens", ["decoding"], **made)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **made)
        self.exits = Counter("exits", "Tokens by the head that emitted them", ["head"], **made)
        self.layers = Histogram(
            "layers_per_token",
            "Layers in front of the emitting head",
            ["decoding"],
            buckets=range(1, spec.num_layers + 1),
            **made,
        )
        self.first_token = Histogram("time_to_first_token_seconds", "From arrival to the first token", buckets=_SECONDS, **made)
        self.seconds = Histogram("request_seconds", "From arrival to the last byte", ["path"], buckets=_SECONDS, **made)
        self.requests = Counter("requests", "Answered requests", ["path", "status"], **made)
        self.queue = Gauge("queue_length", "Sequences that wait for a slot", **made)
        self.running = Gauge("running_sequences", "Sequences that are decoded", **made)
        self.speed = Gauge("tokens_per_second", f"Generated tokens per second over the last {_WINDOW:g} s", **made)
        self.speed.set_function(self.tokens_per_second)
        self._recent: deque[float] = deque()
        self._lock = threading.Lock()
        self.total_tokens = self.total_layers = 0

    def observe_load(self, queued: int, running: int) -> None:
        self.queue.set(queued)
        self.running.set(running)

    def observe_token(self, job: Job, token: Token, first: bool) -> None:
        now = time.monotonic()
        self.tokens.labels(job.mode).inc()
        self.exits.labels(token.head).inc()
        self.layers.labels(job.mode).observe(token.exit_layer)
        self.total_tokens += 1
        self.total_layers += token.exit_layer
        if first:
            self.first_token.observe(now - job.submitted)
            self.prompt_tokens.inc(len(job.ids))
        with self._lock:
            self._recent.append(now)
            self._forget(now)

    def tokens_per_second(self) -> float:
        with self._lock:
            self._forget(time.monotonic())
            return len(self._recent) / _WINDOW

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0] < now - _WINDOW:
            self._recent.popleft()
