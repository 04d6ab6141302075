from __future__ import annotations

import itertools

import pytest
import torch

from eellm.config.schema import RampUpConfig
from eellm.data.batch import GlobalBatch
from eellm.data.batches import (
    BatchPlan,
    GlobalBatches,
    loader,
    loaders,
    restart_at_documents,
    training_batches,
    validation_batches,
)
from eellm.data.corpus import prepare_corpus
from eellm.data.order import SampleOrder
from eellm.layout import ParallelLayout

EOD = 0
LENGTH = 12
TENSORS = ("tokens", "labels", "loss_mask", "positions", "documents", "sample_ids")


class Windows:
    """37 windows of a random stream in which every fourth token or so ends a document."""

    def __init__(self) -> None:
        self.stream = torch.randint(0, 4, (37 * LENGTH + 1,), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.stream[index * LENGTH : (index + 1) * LENGTH + 1]
        return {"tokens": window[:-1], "labels": window[1:], "loss_mask": torch.ones(LENGTH)}


def batches(dp: int = 1, micro: int = 1, size: int = 16, dp_rank: int = 0, seed: int = 5, **plan: object) -> GlobalBatches:
    layout = ParallelLayout(dp=dp, micro_batch_size=micro, global_batch_size=size)
    return GlobalBatches(Windows(), SampleOrder(seed, 37), BatchPlan(layout, dp_rank, EOD, **plan))


def first(source: GlobalBatches, count: int) -> list[GlobalBatch]:
    return list(itertools.islice(source, count))


def samples(batch: GlobalBatch) -> dict[int, list[int]]:
    """Sample number -> tokens."""
    return dict(zip(batch.sample_ids.flatten().tolist(), batch.tokens.flatten(0, 1).tolist(), strict=True))


def assert_same(found: list[GlobalBatch], expected: list[GlobalBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in TENSORS:
            if getattr(other, name) is None:
                assert getattr(one, name) is None
            else:
                torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


@pytest.mark.parametrize(("dp", "micro"), itertools.product((1, 2, 4), (1, 2, 4)))
def test_global_batch_is_the_same_on_all_layouts(dp, micro):
    expected = [samples(batch) for batch in first(batches(), 5)]
    ranks = [first(batches(dp, micro, dp_rank=rank), 5) for rank in range(dp)]
    for step in range(5):
        shares = [samples(rank[step]) for rank in ranks]
        assert all(len(rank[step]) == 16 // (dp * micro) and rank[step].tokens.shape[1] == micro for rank in ranks)
        assert sum(map(len, shares)) == 16
        assert {number: tokens for share in shares for number, tokens in share.items()} == expected[step]
        assert sorted(expected[step]) == list(range(step * 16, step * 16 + 16))


def test_microbatches_are_dealt_to_the_ranks_in_turn():
    """Microbatch m of rank r holds samples m dp b + r b and the b - 1 after it."""
    for rank in range(2):
        batch = batches(dp=2, micro=2, size=8, dp_rank=rank).batch(3)
        expected = [[24 + (m * 2 + rank) * 2 + place for place in range(2)] for m in range(2)]
        assert batch.sample_ids.tolist() == expected


def test_samples_are_the_windows_that_the_order_names():
    windows, order = Windows(), SampleOrder(5, 37)
    for batch in first(batches(micro=4), 4):
        for number, tokens in samples(batch).items():
            assert tokens == windows[order(number)]["tokens"].tolist()


def test_labels_are_the_next_tokens_of_the_stream():
    stream = Windows().stream
    order = SampleOrder(5, 37)
    batch = batches(micro=4).batch(1)
    for number, labels in zip(batch.sample_ids.flatten().tolist(), batch.labels.flatten(0, 1), strict=True):
        begin = order(number) * LENGTH + 1
        assert labels.tolist() == stream[begin : begin + LENGTH].tolist()


def test_resuming_continues_also_on_another_layout():
    uninterrupted = first(batches(micro=4), 6)
    assert_same(first(batches(micro=4, start=3 * 16), 3), uninterrupted[3:])
    ranks = [first(batches(dp=4, micro=2, dp_rank=rank, start=3 * 16), 3) for rank in range(4)]
    for step in range(3):
        union = {number: tokens for rank in ranks for number, tokens in samples(rank[step]).items()}
        assert union == samples(uninterrupted[3 + step])


RAMP = RampUpConfig(start=4, increment=4, samples=30)


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (2, 2), (4, 1)])
def test_a_growing_batch_is_the_same_on_all_layouts_and_after_a_resume(dp, micro):
    ends = [0, 4, 8, 12, 20, 32, 48, 64]  # 4 sequences until sample 10, 8 until 20, 12 until 30, then 16
    windows, order = Windows(), SampleOrder(5, 37)
    for begin in (0, 1, 4):
        ranks = [first(batches(dp, micro, dp_rank=rank, ramp_up=RAMP, start=ends[begin]), 7 - begin) for rank in range(dp)]
        for number, shares in enumerate(zip(*ranks, strict=True), start=begin):
            found = {sample: tokens for share in shares for sample, tokens in samples(share).items()}
            expected = range(ends[number], ends[number + 1])
            assert found == {sample: windows[order(sample)]["tokens"].tolist() for sample in expected}
            assert sum(share.num_sequences for share in shares) == len(expected)


def test_repeat_gives_the_first_batch_again():
    found = first(batches(repeat=True), 3)
    assert_same(found, first(batches(), 1) * 3)


def test_samples_past_the_last_one_have_no_loss():
    batch = batches(micro=4, num_samples=10).batch(0)
    per_sample = dict(zip(batch.sample_ids.flatten().tolist(), batch.loss_mask.flatten(0, 1).sum(-1).tolist(), strict=True))
    assert per_sample == {number: float(LENGTH if number < 10 else 0) for number in range(16)}


def marks_by_loop(tokens: list[int]) -> tuple[list[float], list[int], list[int]]:
    mask, positions, documents = [], [], []
    position = document = 0
    for token in tokens:
        mask.append(0.0 if token == EOD else 1.0)
        positions.append(position)
        documents.append(document)
        position += 1
        if token == EOD:
            position = 0
            document += 1
    return mask, positions, documents


@pytest.mark.parametrize("boundaries", ["ignore", "loss", "reset"])
def test_document_boundaries_against_a_loop(boundaries):
    batch = batches(micro=4, boundaries=boundaries).batch(0)
    assert (batch.tokens == EOD).any()
    assert (batch.documents is None) == (boundaries != "reset")
    for row in itertools.product(range(4), range(4)):
        mask, positions, documents = marks_by_loop(batch.tokens[row].tolist())
        assert batch.loss_mask[row].tolist() == ([1.0] * LENGTH if boundaries == "ignore" else mask)
        if boundaries == "reset":
            assert batch.positions[row].tolist() == positions
            assert batch.documents[row].tolist() == documents
        else:
            assert batch.positions[row].tolist() == list(range(LENGTH))


def test_types_are_those_of_the_contract():
    batch = batches(boundaries="reset").batch(0)
    types = [getattr(batch, name).dtype for name in TENSORS]
    assert types == [torch.int64, torch.int64, torch.float32, torch.int64, torch.int32, torch.int64]


def test_restarting_takes_any_leading_shape():
    tokens = torch.randint(0, 3, (2, 3, 9), generator=torch.Generator().manual_seed(1))
    positions, documents = restart_at_documents(tokens, EOD)
    for row in itertools.product(range(2), range(3)):
        assert (positions[row].tolist(), documents[row].tolist()) == marks_by_loop(tokens[row].tolist())[1:]


@pytest.fixture
def prepared(run_config, text_folder):
    def build(**changes):
        config = run_config(text_folder, **changes)
        return config, prepare_corpus(config), ParallelLayout(micro_batch_size=2, global_batch_size=8)

    return build


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_do_not_change_the_order(prepared, workers):
    config, corpus, layout = prepared(num_workers=workers, document_boundaries="reset")
    endless = training_batches(config, corpus, layout, 0, 0)
    assert_same(list(itertools.islice(loader(config, endless), 5)), first(endless, 5))
    finite = validation_batches(config, corpus, layout, 0, 4)
    assert_same(list(loader(config, finite)), list(finite))
    assert len(list(finite)) == 4


def test_loaders_leave_the_global_generator_alone(prepared):
    config, corpus, layout = prepared()
    state = torch.get_rng_state()
    training, validation = loaders(config, corpus, layout, 0, 0)
    next(iter(training))
    assert len(list(validation)) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_training_follows_seed_and_consumed_samples(prepared):
    config, corpus, layout = prepared()
    uninterrupted = first(training_batches(config, corpus, layout, 0, 0), 4)
    assert_same(first(training_batches(config, corpus, layout, 0, 16), 2), uninterrupted[2:])
    reseeded = config.model_copy(update={"seed": 99})
    assert samples(training_batches(reseeded, corpus, layout, 0, 0).batch(0)) != samples(uninterrupted[0])


@pytest.mark.parametrize(
    ("dp", "micro", "workers", "steps"), [(1, 2, 0, 4), (1, 8, 0, 10**6), (2, 2, 0, 7), (4, 1, 0, 4), (2, 1, 2, 9)]
)
def test_order_is_that_of_seed_and_consumed_samples_alone(prepared, dp, micro, workers, steps):
    """However the batch is split and loaded and however long the run is to be, from the beginning and after 3 steps."""
    config, corpus, _ = prepared(num_workers=workers)
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"max_steps": steps})})
    layout = ParallelLayout(dp=dp, micro_batch_size=micro, global_batch_size=8)
    windows, order = corpus.open("train"), SampleOrder(config.seed, corpus.train_samples)
    for consumed in (0, 24):
        ranks = [itertools.islice(loaders(config, corpus, layout, rank, consumed)[0], 3) for rank in range(dp)]
        for step, shares in enumerate(zip(*ranks, strict=True)):
            found = {sample: tokens for share in shares for sample, tokens in samples(share).items()}
            numbers = range(consumed + 8 * step, consumed + 8 * (step + 1))
            assert found == {number: windows[order(number)]["tokens"].tolist() for number in numbers}


def test_an_epoch_reads_every_window_once(prepared):
    config, corpus, layout = prepared()
    count = corpus.train_samples
    steps = -(-count // layout.global_batch_size)
    seen = {}
    for batch in first(training_batches(config, corpus, layout, 0, 0), steps):
        seen |= samples(batch)
    windows = [window["tokens"].tolist() for window in corpus.open("train")]
    assert sorted(seen[number] for number in range(count)) == sorted(windows)


def test_overfitting_repeats_the_first_batch_after_a_resume_too(prepared):
    config, corpus, layout = prepared(overfit=True)
    plain, _, _ = prepared()
    expected = first(training_batches(plain, corpus, layout, 0, 0), 1) * 3
    assert_same(first(training_batches(config, corpus, layout, 0, 24), 3), expected)


def test_validation_is_fixed_and_counts_no_sample_twice(prepared):
    config, corpus, layout = prepared()
    wanted = list(validation_batches(config, corpus, layout, 0, 10**6))
    again = list(validation_batches(config.model_copy(update={"seed": 7}), corpus, layout, 0, 10**6))
    assert_same(wanted, again)
    ids = [number for batch in wanted for number in batch.sample_ids.flatten().tolist()]
    assert ids == list(range(corpus.validation_samples // 8 * 8))
    windows = corpus.open("validation")
    tokens = [row for batch in wanted for row in batch.tokens.flatten(0, 1).tolist()]
    assert tokens == [windows[number]["tokens"].tolist() for number in ids]


def test_validation_smaller_than_a_batch_is_one_batch_with_each_sample_once(prepared):
    config, corpus, _ = prepared()
    count = corpus.validation_samples
    size = 4 * (count // 4 + 2)
    totals = []
    for dp in (1, 2):
        layout = ParallelLayout(dp=dp, micro_batch_size=2, global_batch_size=size)
        ranks = [list(validation_batches(config, corpus, layout, rank, 5)) for rank in range(dp)]
        assert [len(rank) for rank in ranks] == [1] * dp
        totals.append(sum(rank[0].loss_mask.sum().item() for rank in ranks))
    assert totals == [count * corpus.sequence_length] * 2


def test_no_validation_loader_where_nothing_is_held_out(prepared):
    config, corpus, layout = prepared(split=[1.0])
    assert loaders(config, corpus, layout, 0, 0)[1] is None
