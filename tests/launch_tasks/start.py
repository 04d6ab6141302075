"""What run.py does under an outer launcher, for the stand-in task: python start.py <where> <overrides>."""

from __future__ import annotations

import sys
from pathlib import Path

from eellm.config.compose import compose
from eellm.errors import UserError
from eellm.launch import follow, launch, stop_followers
from eellm.outer import outer_rank
from eellm.resume import open_run

if __name__ == "__main__":
    outer = outer_rank()
    assert outer is not None
    if outer.rank > 0:
        sys.exit(follow())
    where, *overrides = sys.argv[1:]
    try:
        config, run = open_run(
            compose(["task=train", "data.micro_batch_size=1", *overrides], outer.world_size), Path(where), overrides
        )
        launch(config, run, "tests.launch_tasks")
    except UserError as error:
        stop_followers()
        sys.exit(str(error))
