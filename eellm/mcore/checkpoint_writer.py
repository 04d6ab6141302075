"""Writing checkpoints in megatron-core's distributed format: beside their place, and renamed when whole.

What a killed or failed write leaves behind is called `<name>.partial`; nothing reads it, and the next write removes it.
"""

from __future__ import annotations

import errno
import inspect
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import CheckpointException

from eellm.errors import WriteError, writing
from eellm.mcore.checkpoint import from_main_rank
from eellm.mcore.checkpoint_files import failure_reason, make_room, name_whole, partial_path
from eellm.mcore.cpu import cpu_stand_ins
from eellm.mcore.writer_processes import bound_children

_CUT_SHORT = ("inline_container", *(os.strerror(number) for number in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)))
"""Signs that the system takes no more data: what torch says when a file ends before its data do, and the system's reasons."""

# newer releases choose between this and an optional package
_STRATEGY = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}


class CheckpointWriter:
    """Writes checkpoints, in the background if asked to. All ranks call every method together, at the same steps.

    `committed(path)` is called on rank 0 after a checkpoint has got its name.
    """

    def __init__(self, in_background: bool = False, committed: Callable[[Path], None] = lambda path: None):
        self._in_background, self._committed = in_background, committed
        self._queue = AsyncCallsQueue()
        self._pending: Path | None = None

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Write a sharded state. In the background this returns once the values are safe from the next step.

        Raises WriteError on all ranks, leaving earlier checkpoints as they were.
        """
        self.finish(wait=True)
        partial = partial_path(path)
        from_main_rank(lambda: make_room(partial))
        with _write_errors(partial), cpu_stand_ins(), bound_children():
            request = dist_checkpointing.save(state, str(partial), async_sharded_save=self._in_background, **_STRATEGY)
            if request is not None:
                self._queue.schedule_async_request(request)
        self._pending = path
        self.finish(wait=not self._in_background)

    def finish(self, wait: bool) -> None:
        """Give the checkpoint that is being written its name if all ranks are done with it; `wait` until they are."""
        if self._pending is None:
            return
        path, self._pending = self._pending, None
        with _write_errors(partial_path(path)), cpu_stand_ins():
            self._queue.maybe_finalize_async_calls(blocking=wait)
        if self._queue.get_num_unfinalized_calls() > 0:
            self._pending = path
        else:
            from_main_rank(lambda: self._commit(path))

    def _commit(self, path: Path) -> None:
        name_whole(path)
        with writing(path):
            self._committed(path)


def _cut_short(partial: Path) -> str:
    free = shutil.disk_usage(partial.parent).free / 1e6
    return f"the system stopped taking data (full disk, quota or limit on file sizes; {free:,.0f} MB are free there)"


class _Complaints(logging.Handler):
    """What megatron-core logs where it writes: later releases keep only the type of a failed write's error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> _Complaints:
        logging.getLogger(filesystem_async.__name__).addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger(filesystem_async.__name__).removeHandler(self)

    def of_all_ranks(self) -> list[str]:
        gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, self.said)
        return [message for said in gathered for message in said]


@contextmanager
def _write_errors(partial: Path) -> Iterator[None]:
    """Raise WriteError where writing failed, and give its space back: the run has more to write, if only how it ended."""
    try:
        with _Complaints() as complaints:
            yield
    except CheckpointException as error:  # raised on all ranks, with reasons on rank 0 only
        reason = next(iter(complaints.of_all_ranks()), failure_reason(error))

        def report() -> None:
            said = f"{_cut_short(partial)} ({reason})" if any(sign in reason for sign in _CUT_SHORT) else reason
            shutil.rmtree(partial, ignore_errors=True)
            raise WriteError(f"cannot write {partial}: {said}.")

        from_main_rank(report)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise WriteError.of(partial, error) from error
