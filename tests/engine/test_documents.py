"""Documents packed into one sequence with reset boundaries have the losses that each has alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from eellm.data.batch import GlobalBatch
from eellm.data.batches import BatchPlan, GlobalBatches
from eellm.data.order import DatasetOrder
from eellm.engine.megatron import MegatronEngine
from eellm.model.spec import ExitSpec
from tests import workers
from tests.engine.layouts import GLOBAL_BATCH, SEQUENCE, Case, build, tiny_spec

EOD = 0
EXITS = (ExitSpec(1, "embedding"), ExitSpec(2, "mlp", tie_output=False), ExitSpec(3, "block", temperature=1.5), ExitSpec(4))
POSITIONS = {
    "rotary": {},
    "learned": {"position": "learned", "norm": "layernorm", "activation": "gelu", "linear_bias": True},
}
LAYOUTS = {
    "single": {},
    "tp2": {"tp": 2},
    "tp2_sequence_parallel": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2_vp2": {"pp": 2, "vp": 2},
}


class Windows:
    """One window for each sequence of the batch; about every fifth token ends a document."""

    def __init__(self) -> None:
        self.stream = torch.randint(1, 61, (GLOBAL_BATCH * SEQUENCE + 1,), generator=torch.Generator().manual_seed(4))
        self.stream[torch.rand(self.stream.shape, generator=torch.Generator().manual_seed(5)) < 0.2] = EOD

    def __len__(self) -> int:
        return GLOBAL_BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.stream[index * SEQUENCE : (index + 1) * SEQUENCE + 1]
        return {"tokens": window[:-1], "labels": window[1:], "loss_mask": torch.ones(SEQUENCE)}


def documents_alone() -> list[list[GlobalBatch]]:
    """By place in its window, and then by window: batches of one document, which no mask is needed for."""
    by_place: list[list[GlobalBatch]] = []
    for window in map(Windows().__getitem__, range(GLOBAL_BATCH)):
        ends = [0, *((window["tokens"] == EOD).nonzero().flatten() + 1).tolist(), SEQUENCE]
        parts = [slice(begin, end) for begin, end in itertools.pairwise(ends) if end > begin]
        for place, part in enumerate(parts):
            tokens, labels = (window[key][part].view(1, 1, -1) for key in ("tokens", "labels"))
            mask = (tokens != EOD).float()  # what follows the end belongs to another document
            by_place += [[] for _ in range(place + 1 - len(by_place))]
            by_place[place].append(GlobalBatch(tokens, labels, mask, torch.arange(tokens.shape[-1]).view(1, 1, -1)))
    return by_place


def losses_alone(rank: int, case: Case) -> list[dict[str, float]]:
    """Mean loss of every head over the first documents of all windows, over the second ones, and so on."""
    engine = MegatronEngine(build(case, rank), case.options)
    means = []
    for batches in documents_alone():
        runs = [engine.run(batch, case.weights, forward_only=True) for batch in batches]
        tokens = sum(run.num_tokens for run in runs)
        means.append({head: sum(run.means[head] * run.num_tokens for run in runs) / max(tokens, 1) for head in case.spec.heads})
    return means


def losses_packed(rank: int, case: Case) -> list[dict[str, float]]:
    """The same from whole windows as the loader makes them, with the loss of one place at a time."""
    engine = MegatronEngine(build(case, rank), case.options)
    batch = GlobalBatches(Windows(), DatasetOrder(GLOBAL_BATCH), BatchPlan(case.parallel, 0, EOD, "reset")).batch(0)
    means = []
    for place in range(int(batch.documents.max()) + 1):
        mask = batch.loss_mask * (batch.documents == place)
        part = GlobalBatch(batch.tokens, batch.labels, mask, batch.positions, batch.documents)
        means.append(engine.run(part, case.weights, forward_only=True).means)
    return means


@pytest.mark.parametrize("position", POSITIONS)
def test_every_head_sees_a_document_as_if_alone(position: str) -> None:
    spec = tiny_spec(exits=EXITS, **POSITIONS[position])
    (alone,) = workers.run(1, losses_alone, Case(spec))
    assert len(alone) >= 5, "several documents in a window"
    assert set(alone[0]) == {"exit_01", "exit_02", "exit_03", "exit_04", "final"}
    for layout in LAYOUTS.values():
        case = Case(spec, layout)
        for packed in workers.run(case.parallel.world_size, losses_packed, case):
            assert len(packed) == len(alone)
            for found, wanted in zip(packed, alone, strict=True):
                assert found == pytest.approx(wanted, rel=1e-5)
