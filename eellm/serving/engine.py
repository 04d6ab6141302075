"""The one thread that decodes: it admits jobs, takes steps, hands tokens on, and keeps time.

`submit` and `cancel` may be called from any thread; everything else belongs to the thread that runs `serve`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from eellm.config.schema import DecodingMode
from eellm.data.tokenizer import Tokenizer
from eellm.serving.errors import ApiError, stopping, too_slow
from eellm.serving.job import Job
from eellm.serving.ranks import Ranks, Replica, Submission, Tick
from eellm.serving.statistics import Statistics

_PATIENCE = 0.25
"""Seconds without work after which the engine looks up: was it asked to end, are the other ranks still there?"""


class Engine:
    """`max_queue` jobs may wait; `timeout` is the seconds that one may take, waiting included."""

    def __init__(
        self, replica: Replica, tokenizer: Tokenizer, ranks: Ranks, max_queue: int, timeout: float, statistics: Statistics
    ):
        self.replica, self.tokenizer, self.ranks, self.statistics = replica, tokenizer, ranks, statistics
        self.max_queue, self.timeout = max_queue, timeout
        self.stopping = False
        """No new jobs are taken."""
        self._news = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._turns: dict[str, int] = {}
        """The last job of each client that is here."""
        self._durations: deque[float] = deque([1.0], maxlen=64)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none. Raises ApiError where there is no room or the server ends."""
        with self._news:
            if self.stopping:
                raise stopping()
            room = self.max_queue - len(self._waiting)
            if len(jobs) > room + self._free_slots(jobs[0].mode):
                raise ApiError(
                    429,
                    f"The server is busy: {len(self._waiting)} sequences wait and {self.max_queue} may.",
                    code="queue_full",
                    retry_after=self._expected_wait(),
                )
            self._waiting.extend(jobs)
            self._news.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody listens to these any more."""
        with self._news:
            for job in jobs:
                job.cancelled = True
            self._news.notify()

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def serve(self, asked_to_end: Callable[[], bool]) -> None:
        """Work until asked to end and what runs is finished; what waits then is refused.

        An exception, such as a rank that is gone, ends all jobs with an error and is raised.
        """
        try:
            while not (self._may_end(asked_to_end) and not self._running):
                tick = self._next_tick()
                if tick is not None:
                    self._apply(self.ranks.share(tick))
            self.ranks.share(Tick(end=True))
            self.replica.close()
        except BaseException:
            self._refuse_all(ApiError(500, "The server has failed and ends.", code="server_failed"))
            raise

    def _may_end(self, asked_to_end: Callable[[], bool]) -> bool:
        if not self.stopping and asked_to_end():
            with self._news:
                self.stopping = True
                waiting, self._waiting = self._waiting, deque()
            for job in waiting:
                job.finish(stopping())
        return self.stopping

    def _refuse_all(self, error: ApiError) -> None:
        with self._news:
            self.stopping = True
            jobs = [*self._waiting, *self._running.values()]
            self._waiting.clear()
            self._running.clear()
        for job in jobs:
            job.finish(error)

    def _next_tick(self) -> Tick | None:
        """What comes next, after a short wait where there is nothing to do; None where no rank has to know of that."""
        with self._news:
            if not self._waiting and not self._running:
                self._news.wait(_PATIENCE)
            stops = self._drop_unwanted()
            submissions = self._admit()
        self.statistics.observe_load(len(self._waiting), len(self._running))
        if not stops and not submissions and not self._running:
            return None if self.ranks.alone else Tick(meet=True)
        return Tick(stops, submissions)

    def _drop_unwanted(self) -> list[int]:
        """Forget jobs that nobody wants or that took too long, or that have ended; returns those that decoders still run."""
        now = time.monotonic()
        for job in (*self._waiting, *self._running.values()):
            if now > job.deadline:
                job.finish(too_slow(self.timeout))
        self._waiting = deque(job for job in self._waiting if not (job.cancelled or job.over))
        stops = [number for number, job in self._running.items() if job.cancelled or job.over]
        for number in stops:
            del self._running[number]
        return stops

    def _admit(self) -> list[Submission]:
        """Give free slots to those who wait: first to the client with the fewest, whose last turn is longest ago."""
        submissions = []
        shares = Counter(job.client for job in self._running.values())
        self._turns = {job.client: self._turns.get(job.client, -1) for job in (*self._waiting, *self._running.values())}
        while admissible := [job for job in self._waiting if self._free_slots(job.mode)]:
            job = min(admissible, key=lambda job: (shares[job.client], self._turns[job.client]))
            self._waiting.remove(job)
            self._running[job.number] = job
            shares[job.client] += 1
            self._turns[job.client] = job.number
            job.begin(self.tokenizer)
            submissions.append(Submission(job.number, job.mode, job.ids, job.request))
        return submissions

    def _free_slots(self, mode: DecodingMode) -> int:
        decoder = self.replica.decoders[mode]
        taken = sum(self.replica.decoders[job.mode] is decoder for job in self._running.values())
        return max(0, decoder.options.max_batch - taken)

    def _apply(self, tick: Tick) -> None:
        ended = []
        for emission in self.replica.apply(tick):
            job = self._running[emission.number]
            first = job.first_token is None
            job.add(emission.token, emission.end)
            self.statistics.observe_token(job, emission.token, first)
            if emission.end is not None:
                ended.append(emission.number)
                self._durations.append(time.monotonic() - (job.admitted or job.submitted))
        with self._news:  # others count who runs
            for number in ended:
                del self._running[number]

    def _expected_wait(self) -> float:
        """Seconds until the queue has moved on by one, judged by the last jobs."""
        slots = max(decoder.options.max_batch for decoder in self.replica.decoders.values())
        return sum(self._durations) / len(self._durations) * len(self._waiting) / slots
