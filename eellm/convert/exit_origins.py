"""Where the exits of a changed model come from: which stay, which move, which are new, and what cannot be. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from eellm.errors import Problem
from eellm.model.spec import ExitSpec

_PARTS = {"embedding": set(), "norm": {"norm"}, "mlp": {"norm", "mlp"}, "block": {"norm", "block"}}


def exit_origins(before: Sequence[ExitSpec], after: Sequence[ExitSpec], moves: Mapping[int, int]) -> dict[int, int | None]:
    """Layer of every exit of the changed model -> layer of the exit whose weights it takes; None for a new one.

    An exit that moves (`moves`: layer before -> layer after) takes all its weights along; the others stay where they are.
    """
    arriving = {target: source for source, target in moves.items()}
    staying = {exit_.layer for exit_ in before} - set(moves)
    return {exit_.layer: arriving.get(exit_.layer, exit_.layer if exit_.layer in staying else None) for exit_ in after}


def moved(exits: Sequence[ExitSpec], moves: Mapping[int, int]) -> list[ExitSpec]:
    """The exits after their moves, in order of depth."""
    there = [ExitSpec(moves.get(exit_.layer, exit_.layer), exit_.head, exit_.tie_output, exit_.temperature) for exit_ in exits]
    return sorted(there, key=lambda exit_: exit_.layer)


def edit_problems(
    before: Sequence[ExitSpec], after: Sequence[ExitSpec], moves: Mapping[int, int], init: str
) -> Iterator[Problem]:
    """Why weights would be lost or find no place."""
    yield from _move_problems([exit_.layer for exit_ in before], [exit_.layer for exit_ in after], moves)
    old = {exit_.layer: exit_ for exit_ in before}
    for exit_ in after:
        origin = exit_origins(before, after, moves)[exit_.layer]
        if origin in old:
            yield from _kind_problems(old[origin], exit_, init)


def _move_problems(before: list[int], after: list[int], moves: Mapping[int, int]) -> Iterator[Problem]:
    shown, path = "{" + ", ".join(f"{source}: {target}" for source, target in moves.items()) + "}", "convert.move"
    for source, target in moves.items():
        if source not in before:
            reason = f"no exit after layer {source}: the run has them after {before}"
            yield Problem(path, shown, reason, "move an exit that is there")
        if target not in after:
            reason = f"an exit moves to layer {target}, and exits.layers={after} has none there"
            yield Problem(path, shown, reason, "name it in exits.layers, or leave exits.layers out")
        if list(moves.values()).count(target) > 1:
            yield Problem(path, shown, f"two exits move to layer {target}", "one exit to one layer")
        if target in before and target not in moves:
            reason = f"the exit after layer {target} would lose its weights to the one that moves there"
            yield Problem(path, shown, reason, "move it too, or drop it in a conversion before")


def _kind_problems(old: ExitSpec, new: ExitSpec, init: str) -> Iterator[Problem]:
    lost = sorted(_PARTS[old.head] - _PARTS[new.head])
    fix = f"keep it, or drop {old.name} in one conversion and add it in the next"
    if lost:
        reason = f"{old.name} has head={old.head}, and its {' and '.join(lost)} would be lost"
        yield Problem("exits.head", new.head, reason, fix)
    if new.tie_output and not old.tie_output:
        yield Problem("exits.tie_output", True, f"{old.name} has an output matrix of its own, which would be lost", fix)
    if old.tie_output and not new.tie_output and init != "copy":
        reason = f"{new.name}, which has learned to use the model's output matrix, would get a random one of its own"
        yield Problem("exits.tie_output", False, reason, "exits.init=copy")
