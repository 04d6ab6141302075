"""Signals that ask a run to end: SIGTERM, Ctrl-C, and SIGUSR1 and SIGUSR2, by which SLURM and submitit warn of a time limit.

Whoever can end well at some later point (training, which writes a checkpoint at the end of its step) does so inside
`deferred`; everywhere else the signal ends the run where it stands.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(BaseException):
    """The run was asked to end and has. No Exception: it is nobody's fault and nobody's to handle on the way."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name

    @property
    def exit_status(self) -> int:
        """What a shell reports of a process that this signal ended."""
        return 128 + self.number


class Requests:
    """What this process has been asked so far. There is one per process, as there is one set of signal handlers."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the last signal; 0 = none."""
        self.impatient = True
        """A second signal ends the run at once. Not on a rank that somebody else started: a launcher repeats to its ranks
        what the terminal sent them already, and it is the launcher that loses patience."""
        self.deferred = 0
        """How many `deferred` blocks are open."""
        self.passed_on: Callable[[int, bool], None] = lambda number, again: None
        """Called with the signal, and whether it is a repeated one."""

    def handle(self, number: int, _frame: object = None) -> None:
        again, self.received = self.received > 0, number
        self.passed_on(number, again)
        if self.impatient if again else not self.deferred:
            raise Preempted(number)


REQUESTS = Requests()


@contextmanager
def heeded(impatient: bool = True) -> Iterator[None]:
    """Handle the signals; afterwards hand a signal that ended the run to who handled it before (submitit requeues its job)."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread have handlers
        yield
        return
    REQUESTS.impatient = impatient
    before: dict[int, Any] = {number: signal.signal(number, REQUESTS.handle) for number in SIGNALS}
    try:
        yield
    except Preempted as preempted:
        _restore(before)
        if preempted.number != signal.SIGINT and callable(before[preempted.number]):
            before[preempted.number](preempted.number, None)
        raise
    finally:
        _restore(before)
        REQUESTS.__init__()  # type: ignore[misc]


@contextmanager
def deferred(pass_on: Callable[[int, bool], None] | None = None) -> Iterator[None]:
    """Note signals in `requested()` instead of ending the run; one that is still unanswered at the end of the block does so.

    `pass_on(number, again)` is called for each signal when it arrives.
    """
    before = REQUESTS.passed_on
    REQUESTS.deferred += 1
    REQUESTS.passed_on = pass_on or before
    try:
        yield
    finally:
        REQUESTS.deferred -= 1
        REQUESTS.passed_on = before
    if REQUESTS.received and not REQUESTS.deferred:
        raise Preempted(REQUESTS.received)


def requested() -> int:
    """Number of the signal that asked this process to end; 0 = none."""
    return REQUESTS.received


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
