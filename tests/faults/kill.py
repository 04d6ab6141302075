"""Kill a training run again and again, resume it with the same command, and compare its end with an uninterrupted run.

    python -m tests.faults.kill --kills 50 --seed 1 --folder /tmp/kills

Every kill is a SIGKILL of one process, chosen at random among the parent and the ranks of a pipeline of two, at a
random moment of a random phase. Prints one line a kill, then what became of the runs; the exit status is 1 where a
survivor stayed longer than a minute or a run ended otherwise than the uninterrupted one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from eellm.rundir import RunDirectory
from tests.faults.runs import Life, differences, finish, start

LAYOUT = ("parallel=pp2",)
PHASES = {"starting": 1, "training": 2, "saving": 3}
"""Phase of a run's life -> how often it is chosen."""
PATIENCE = 60.0
"""Seconds within which the other processes must have ended."""


@dataclass
class Kill:
    """`step`: the last one on record when the process died; `resumed_from`: the checkpoint that the life had begun with."""

    campaign: int
    phase: str
    victim: str
    step: int
    resumed_from: int
    seconds: float

    def __str__(self) -> str:
        where = f"campaign {self.campaign}  {self.phase:<9} {self.victim:<7}"
        return f"{where} at step {self.step:>2}, resumed from {self.resumed_from:>2}, the others ended in {self.seconds:5.2f} s"


def newest_checkpoint(folder: Path) -> int:
    runs = [RunDirectory(path.parent) for path in folder.glob("*/status.json")]
    return max((int(step.name.removeprefix("step_")) for run in runs for step in run.steps()), default=0)


def kill_once(life: Life, campaign: int, phase: str, victim: str, chance: random.Random) -> Kill | None:
    """Wait for the moment, kill; None where the run came to its end before."""
    begun = newest_checkpoint(life.folder)
    ranked = life.wait_until(lambda: len(life.ranks()) == 2)
    if phase == "starting":
        time.sleep(chance.uniform(0.0, 6.0))
    else:
        skipped = chance.randint(1, 3)
        ranked = ranked and life.wait_until(lambda: life.step() >= begun + skipped)
        if phase == "saving":
            ranked = ranked and life.wait_until(life.saving, poll=0.002)
        time.sleep(chance.uniform(0.0, 0.15 if phase == "saving" else 1.0))
    try:
        processes = {"parent": psutil.Process(life.process.pid), **{f"rank {i}": rank for i, rank in enumerate(life.ranks())}}
        alive = ranked and life.process.poll() is None and processes[victim].is_running()
    except (psutil.NoSuchProcess, KeyError):
        alive = False
    if not alive:
        life.seconds_to_end(timeout=10 * PATIENCE)  # to its end: how long that takes is no matter
        return None
    if phase != "starting":
        phase = "saving" if life.saving() else "training"
    processes[victim].kill()
    step = life.step()
    return Kill(campaign, phase, victim, step, begun, life.seconds_to_end(timeout=2 * PATIENCE))


def run_campaigns(folder: Path, kills: int, seed: int) -> tuple[list[Kill], list[list[str]]]:
    """Campaigns until there are enough kills; also, for each campaign, where its end differs from the uninterrupted run's."""
    chance = random.Random(seed)
    wanted = finish(folder / "uninterrupted", *LAYOUT)
    done: list[Kill] = []
    ends: list[list[str]] = []
    while len(done) < kills:
        place = folder / f"campaign_{len(ends)}"
        for _ in range(min(8, kills - len(done))):
            life = start(place, *LAYOUT)
            phase = chance.choices(list(PHASES), list(PHASES.values()))[0]
            kill = kill_once(life, len(ends), phase, chance.choice(["parent", "rank 0", "rank 1"]), chance)
            if kill is None:
                break
            done.append(kill)
            print(kill, flush=True)
        finished = [run for run in life.runs() if run.status()["state"] == "done"]
        ends.append(differences(finished[0] if finished else finish(place, *LAYOUT), wanted))
        print(f"campaign {len(ends) - 1}: " + ("equal" if not ends[-1] else f"DIFFERS in {ends[-1][:5]}"), flush=True)
    return done, ends


def report(kills: list[Kill], ends: list[list[str]]) -> None:
    print(f"\n{len(kills)} kills in {len(ends)} runs; {sum(not end for end in ends)} of them ended equal, bit by bit")
    for phase in PHASES:
        victims = Counter(kill.victim for kill in kills if kill.phase == phase)
        print(f"  {phase:<9}" + ", ".join(f"{victim} {count}" for victim, count in sorted(victims.items())))
    seconds = sorted(kill.seconds for kill in kills)
    print(f"the others ended within {seconds[-1]:.1f} s (median {statistics.median(seconds):.1f} s)")
    pairs = [(kill, after) for kill, after in pairwise(kills) if after.campaign == kill.campaign]
    lost = [max(0, kill.step - after.resumed_from) for kill, after in pairs if kill.step]
    print(f"steps lost by a kill: {dict(sorted(Counter(lost).items()))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    kills, ends = run_campaigns(options.folder, options.kills, options.seed)
    report(kills, ends)
    sys.exit(1 if any(ends) or max(kill.seconds for kill in kills) > PATIENCE else 0)


if __name__ == "__main__":
    main()
