"""What goes before the tasks that stand in for others."""

from __future__ import annotations

import os

from eellm.tasks.context import TaskContext

WITHOUT_RANKS = ()


def prepare(context: TaskContext) -> None:
    """Leaves a file for each call, named by who made it."""
    (context.run_dir / f"prepared_by_{os.environ.get('RANK', 'parent')}_{os.getpid()}").touch()
