"""The parity matrix: which models, layouts and ways to train them are held against one-process autograd.

    python -m tests.engine.matrix

runs it and prints a table: largest relative difference of a gradient, of a loss and of the gradient norm, case by case.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import torch

from eellm.mcore.data_parallel import ReductionOptions
from eellm.model.objective import ObjectiveOptions
from eellm.model.spec import ExitSpec
from tests import workers
from tests.engine.layouts import Case, assemble, global_batch, one_step, tiny_spec
from tests.engine.pairwise import Pair, Row, all_pairs, covering_rows
from tests.reference import Reference

LAYOUTS: dict[str, dict] = {
    "pp1": {},
    "pp2": {"pp": 2},
    "pp3": {"pp": 3},
    "pp4": {"pp": 4},
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "dp2": {"dp": 2},
    "pp2_tp2": {"pp": 2, "tp": 2},
    "pp2_vp2": {"pp": 2, "vp": 2},
    "pp4_vp2": {"pp": 4, "vp": 2},
    "pp2_dp2": {"pp": 2, "dp": 2},
}
FACTORS = {
    "layout": list(LAYOUTS),
    "exits": ["first", "middle", "last", "end", "start", "every"],
    "unmasked": ["all", "1", "5", "31"],
    "head": ["embedding", "norm", "mlp", "block"],
    "recompute": ["none", "selective", "full"],
    "layers": ["even", "uneven"],
    "input": ["tied", "untied"],
    "output": ["tied", "untied"],
    "exit": ["deferred", "eager"],
    "reduction": ["plain", "overlap", "distributed_overlap"],
}
"""`input`: the model's own output matrix and its input embedding; `output`: the exits' matrices and the model's.
`exits`: inside the first, the middle, the last stage; at the `end` of a stage or the `start` of the next; in `every` stage."""
HALF = FACTORS | {"dtype": ["bf16", "fp16"]}

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 8e-3}
"""Relative. Half precision rounds every activation and its gradient to 2^-9 or 2^-12 of it; through the 30 to 100 roundings in a
row of these models independent errors add up to 1-3 % or 0.1-0.4 %. A lost loss scale or a wrong divisor is a factor."""


def num_stages(row: Row) -> int:
    return LAYOUTS[row["layout"]].get("pp", 1) * LAYOUTS[row["layout"]].get("vp", 1)


def possible(row: Row) -> bool:
    """Whether values can stand together: without a second stage there is no boundary, without a third no middle."""
    if "layout" not in row:
        return True
    too_few = {"middle": 3, "end": 2, "start": 2}
    return num_stages(row) >= max(too_few.get(row.get("exits", ""), 1), 2 if row.get("layers") == "uneven" else 1)


def required() -> tuple[list[Pair], list[Pair]]:
    """Pairs that fp32 must cover, and pairs of half precision: each of its types with everything else."""
    half = [pair for pair in all_pairs(HALF, possible) if any(name == "dtype" for name, _ in pair)]
    return all_pairs(FACTORS, possible), half


def rows() -> list[Row]:
    """All cases; those that share a group of ranks stand together."""
    full, half = required()
    exact = [row | {"dtype": "fp32"} for row in covering_rows(FACTORS, possible, full)]
    return sorted(exact + covering_rows(HALF, possible, half), key=lambda row: case_of(row).parallel.world_size)


def name_of(row: Row) -> str:
    return "-".join(row.values())


def exit_layers(row: Row, counts: list[int]) -> list[int]:
    last = list(itertools.accumulate(counts))
    first = [end - count + 1 for end, count in zip(last, counts, strict=True)]
    return sorted(
        {
            "first": {1},
            "middle": {first[len(counts) // 2]},
            "last": {max(first[-1], last[-1] - 1), last[-1]},
            "end": {last[0], last[max(0, len(counts) - 2)]},
            "start": {last[0], last[max(0, len(counts) - 2)]},
            "every": {*first},
        }[row["exits"]]
    )


def case_of(row: Row) -> Case:
    stages = num_stages(row)
    counts = [4] if stages == 1 else [2] * stages
    if row["layers"] == "uneven":
        counts[0], counts[-1] = 3, 1
    exits = [ExitSpec(layer, row["head"], row["output"] == "tied") for layer in exit_layers(row, counts)]
    distributed = row["reduction"] == "distributed_overlap"
    return Case(
        tiny_spec(num_layers=sum(counts), exits=tuple(exits), tie_embeddings=row["input"] == "tied"),
        LAYOUTS[row["layout"]],
        layers_per_stage=tuple(counts),
        boundary="start" if row["exits"] == "start" else "end",
        options=ObjectiveOptions(row["exit"] == "deferred", chunk=11),
        recompute=row["recompute"],
        reduction=ReductionOptions(distributed, row["reduction"] != "plain", distributed),
        dtype=row["dtype"],
        unmasked=None if row["unmasked"] == "all" else int(row["unmasked"]),
    )


@dataclass
class Differences:
    """Largest relative differences from the oracle; `parameter` has the gradient that differs most."""

    gradient: float = 0.0
    loss: float = 0.0
    norm: float = 0.0
    parameter: str = ""

    @property
    def largest(self) -> float:
        return max(self.gradient, self.loss, self.norm)


def relative(actual: torch.Tensor | float, expected: torch.Tensor | float) -> float:
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def compare(case: Case) -> Differences:
    """Train one step on the case's layout and hold every rank's results against the oracle in fp64."""
    results = workers.run(case.parallel.world_size, one_step, case)
    parameters = {name: copies[0].double().requires_grad_() for name, copies in assemble(results, "parameter").items()}
    objective, means = Reference(case.spec, parameters).losses(global_batch(case), case.weights)
    objective.backward()
    found = Differences()
    for result in results:
        for losses in (result["losses"], result["validation"]):
            assert losses.num_tokens == global_batch(case).loss_mask.sum()
            assert set(losses.means) == set(means)
            found.loss = max(found.loss, *(relative(losses.means[name], mean) for name, mean in means.items()))
    whole = assemble(results, "gradient")
    assert set(whole) == set(parameters)
    for name, copies in whole.items():
        for copy in copies:
            difference = relative(copy, parameters[name].grad)
            if not difference <= found.gradient:  # a NaN is a difference
                found.gradient, found.parameter = difference, name
    norm = torch.stack([parameter.grad.norm() for parameter in parameters.values()]).norm()
    found.norm = max(relative(result["grad_norm"], norm) for result in results)
    return found


def main() -> None:
    print("| " + " | ".join([*HALF, "gradient", "loss", "norm"]) + " |")
    print("|" + "---|" * (len(HALF) + 3))
    worst: dict[str, Differences] = {}
    for row in rows():
        found = compare(case_of(row))
        print(
            "| " + " | ".join([*row.values(), *(f"{x:.1e}" for x in (found.gradient, found.loss, found.norm))]) + " |", flush=True
        )
        kept = worst.setdefault(row["dtype"], found)
        worst[row["dtype"]] = found if found.largest > kept.largest else kept
    for dtype, found in worst.items():
        print(f"\n{dtype}: largest difference {found.largest:.1e} of {TOLERANCE[dtype]:.0e} allowed ({found.parameter})")
    sys.exit(any(not found.largest < TOLERANCE[dtype] for dtype, found in worst.items()))


if __name__ == "__main__":
    main()
