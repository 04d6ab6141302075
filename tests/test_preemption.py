"""What a signal does to a process, by where the process stands and who started it."""

# ruff: noqa: PT012  (where in the block the signal arrives is what is tested)

from __future__ import annotations

import signal

import pytest

from eellm.preemption import SIGNALS, Preempted, deferred, heeded, requested


@pytest.mark.parametrize("number", SIGNALS)
def test_at_once_where_nothing_is_deferred(number: int) -> None:
    reached = False
    with pytest.raises(Preempted) as caught, heeded():
        signal.raise_signal(number)
        reached = True
    assert not reached
    assert (caught.value.number, caught.value.exit_status) == (number, 128 + number)
    assert str(caught.value) == signal.Signals(number).name
    assert not isinstance(caught.value, Exception), "`except Exception` on the way up must let it pass"


def test_noted_where_it_is_deferred_and_not_lost_at_the_end() -> None:
    passed_on, seen = [], 0
    with pytest.raises(Preempted, match="SIGUSR1"), heeded(), deferred(lambda number, again: passed_on.append((number, again))):
        assert requested() == 0
        signal.raise_signal(signal.SIGUSR1)
        seen = requested()
    assert seen == signal.SIGUSR1
    assert passed_on == [(signal.SIGUSR1, False)]


def test_who_answers_a_deferred_signal_early_is_not_answered_twice() -> None:
    with pytest.raises(Preempted) as caught, heeded(), deferred():
        signal.raise_signal(signal.SIGTERM)
        raise Preempted(requested())
    assert caught.value.__context__ is None


def test_a_second_signal_ends_a_process_of_the_users_at_once() -> None:
    count = 0
    with pytest.raises(Preempted), heeded(), deferred():
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            count += 1
    assert count == 1


def test_a_second_signal_changes_nothing_on_a_rank() -> None:
    count = 0
    with pytest.raises(Preempted), heeded(impatient=False):
        with deferred():
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
                count += 1
        count += 100
    assert count == 3


def test_a_rank_that_is_ending_is_not_interrupted_again() -> None:
    closed = False
    with pytest.raises(Preempted), heeded(impatient=False):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            closed = True
    assert closed


def test_each_run_of_a_process_begins_unasked() -> None:
    for _ in range(2):
        with pytest.raises(Preempted), heeded(), deferred():
            assert requested() == 0
            signal.raise_signal(signal.SIGTERM)


def test_who_handled_the_signal_before_gets_it_when_the_run_has_ended() -> None:
    """So submitit requeues a job after its checkpoint is written."""
    events: list[object] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: events.append(number))
    try:
        with pytest.raises(Preempted), heeded(), deferred():
            signal.raise_signal(signal.SIGUSR2)
            events.append("saved")
        assert events == ["saved", signal.SIGUSR2]
        signal.raise_signal(signal.SIGUSR2)
        assert len(events) == 3, "its handler is back"
    finally:
        signal.signal(signal.SIGUSR2, before)
