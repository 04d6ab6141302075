"""Requests come and go: each gets what it would get alone, no state is lost, and what does not fit is refused."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from eellm.decoding.continuation import Continuation, Request
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.model import memory
from eellm.decoding.model.lean_layer import DecodingContext, LeanLayer
from eellm.decoding.policy import never_exit
from eellm.decoding.sampling import SamplingOptions
from eellm.errors import ConfigError
from eellm.model.spec import ModelSpec
from tests import workers
from tests.decoding.batches import Batch, decode_batches
from tests.decoding.models import BLOCKS, build, policy, spec, watching
from tests.decoding.test_modes import MODES

SAMPLINGS = [SamplingOptions(*options) for options in ((0.0,), (0.8,), (1.0, 5), (1.3, 0, 0.9))]


def random_requests(count: int, seed: int) -> list[tuple[tuple[int, ...], Request]]:
    draw = random.Random(seed)
    requests = []
    for number in range(count):
        prompt = tuple(draw.randrange(31) for _ in range(draw.randint(1, 12)))
        eos = draw.randrange(31) if draw.random() < 0.8 else None
        requests.append((prompt, Request(draw.randint(1, 12), draw.choice(SAMPLINGS), number, eos)))
    return requests


@pytest.mark.parametrize(("mode", "count"), [("catch_up", 200), ("self_speculative", 40), ("kv_recompute", 20), ("full", 20)])
def test_each_request_is_served_as_if_alone(mode: str, count: int) -> None:
    spec_ = spec(exits=BLOCKS, vocab_size=31)
    requests = random_requests(count, seed=len(mode))
    arrivals = [random.Random(number).randrange(count) for number in range(count)]
    chosen = policy(spec_, "max_probability", (0.7, 0.4, 0.3), least=1)
    together = Batch(spec_, chosen, MODES[mode], requests, arrivals)
    jobs = [together.of(max_batch=7), together.of(max_batch=7, prefill_chunk=5), together.of(max_batch=1, max_tokens=None)]
    batch, chunked, alone = workers.run(1, decode_batches, jobs)[0]
    assert (batch.most, chunked.most, alone.most) == (7, 7, 1)
    assert batch.ends == chunked.ends == alone.ends
    assert {"eos", "length"} <= set(batch.ends)
    for own, exact in zip([*batch.tokens, *chunked.tokens], [*alone.tokens, *alone.tokens], strict=True):
        assert [(token.id, token.head, token.drafted_by) for token in own] == [
            (token.id, token.head, token.drafted_by) for token in exact
        ]
        for token, wanted in zip(own, exact, strict=True):
            assert token.logprob == pytest.approx(wanted.logprob, abs=2e-4)
            assert token.confidence == pytest.approx(wanted.confidence, abs=2e-5)
    spoken = Counter(token.head for tokens in batch.tokens for token in tokens)
    assert len(spoken) >= (3 if mode in ("catch_up", "kv_recompute") else 1)


def watched(rank: int, spec_: ModelSpec, thresholds: tuple[float, ...], mode: str) -> tuple[list[int], dict, dict]:
    """Lengths of the sequences, and by layer and slot the positions that went through it, before and after draining."""
    stage = build(spec_)
    seen: dict[tuple[str, int], list[int]] = {}

    def record(layer: LeanLayer, context: DecodingContext) -> None:
        for span in context.kv.spans:
            seen.setdefault((layer.name, span.slot), []).extend(span.positions)

    requests = [(prompt, Request(8)) for prompt, _ in random_requests(5, seed=3)]
    decoder = Decoder(stage, policy(spec_, "max_probability", thresholds), DecoderOptions(mode, max_batch=5))
    sequences = [decoder.submit(prompt, request) for prompt, request in requests]
    with watching(record):
        while any(sequence.end is None for sequence in sequences):
            decoder.step()
            for sequence in sequences:
                queue = sequence.queue
                assert len(queue) == len(sequence.ids) - 1
                assert sum(boundary.waiting for boundary in queue.before) == queue.pending
                kv = queue.kv
                assert all(kv.filled(str(layer), queue.slot) >= queue.complete for layer in range(1, spec_.num_layers + 1))
        before = {key: list(positions) for key, positions in seen.items()}
        decoder.drain()
    return [len(sequence.queue) for sequence in sequences], before, seen


@pytest.mark.parametrize("thresholds", [(0.6, 0.4, 0.3), (0.2, 0.9, 0.9), (0.9, 0.2, 0.5)])
def test_every_token_of_a_batch_passes_every_layer_once_in_order(thresholds: tuple[float, ...]) -> None:
    lengths, before, after = workers.run(1, watched, spec(exits=BLOCKS), thresholds, "catch_up")[0]
    layers = ("1", "2", "3", "4", "exit_01", "exit_02", "exit_04")
    assert set(after) == {(layer, slot) for layer in layers for slot in range(5)}
    for (layer, slot), positions in after.items():
        assert positions == list(range(lengths[slot])), (layer, slot)
        assert before[layer, slot] == positions[: len(before[layer, slot])]
    assert sum(map(len, before.values())) < sum(map(len, after.values())), "nothing was pending"


def accounts(rank: int, spec_: ModelSpec, seed: int) -> tuple[int, int]:
    """Requests that come and go under random options. After every step: each layer has passed the first tokens of each
    sequence that runs, once and in order, and all others wait in front of it. Returns (tokens waiting at most, sequences)."""
    draw, stage = random.Random(seed), build(spec_)
    thresholds = tuple(draw.uniform(0.1, 0.8) for _ in spec_.exits)
    chosen = policy(spec_, "max_probability", thresholds, least=draw.randrange(3))
    options = DecoderOptions("catch_up", draw.choice([None, 2, 5]), max_batch=draw.randint(2, 4))
    decoder = Decoder(stage, chosen, replace(options, prefill_chunk=(None, 1, 4)[seed % 3]))
    sequences, most = [], 0
    seen: dict[tuple[str, Continuation], list[int]] = {}

    def record(layer: LeanLayer, context: DecodingContext) -> None:
        owners = {sequence.queue.slot: sequence for sequence in decoder.running}
        for span in context.kv.spans:
            seen.setdefault((layer.name, owners[span.slot]), []).extend(span.positions)

    requests = random_requests(12, seed)
    with watching(record):
        while len(sequences) < len(requests) or any(sequence.end is None for sequence in sequences):
            if len(sequences) < len(requests) and draw.random() < 0.7:
                sequences.append(decoder.submit(*requests[len(sequences)]))
            decoder.step()
            for sequence in decoder.running:
                waiting = 0
                for segment, boundary in zip(decoder.model.segments, sequence.queue.before, strict=True):
                    waiting += boundary.waiting
                    last = len(sequence.ids) - 1 if sequence.entered else len(sequence.queue)
                    for layer in segment.layers:
                        assert seen.get((layer.name, sequence), []) == list(range(last - waiting)), layer.name
                most = max(most, waiting)
    return most, len({sequence for _, sequence in seen})


def test_no_state_is_lost_or_passes_twice() -> None:
    spec_ = spec(exits=BLOCKS, vocab_size=31)
    found = [workers.run(1, accounts, spec_, seed)[0] for seed in range(8)]
    assert {sequences for _, sequences in found} == {12}
    assert sorted(most for most, _ in found)[2] >= 2, "little was pending"


def served_beside_a_long_prompt(rank: int, spec_: ModelSpec, chunk: int | None) -> tuple[list[int], list[int]]:
    """Rows that each step takes through the first layer after a long prompt has come, and which of its two sequences speak."""
    stage, rows, spoke = build(spec_), [0], []

    def count(layer: LeanLayer, context: DecodingContext) -> None:
        rows[-1] += sum(len(span.positions) for span in context.kv.spans) if layer.name == "1" else 0

    options = DecoderOptions("catch_up", max_batch=2, max_tokens=60, prefill_chunk=chunk)
    decoder = Decoder(stage, policy(spec_, "max_probability", (0.4, 0.4, 0.4)), options)
    short = decoder.submit((1, 2), Request(20))
    decoder.step()
    decoder.submit(tuple(range(31)), Request(3))
    with watching(count):
        for _ in range(6):
            spoke.append(sum(1 << (sequence is not short) for sequence, _ in decoder.step()))
            rows.append(0)
    return rows[:-1], spoke


def test_a_long_prompt_passes_beside_the_tokens_of_others() -> None:
    """31 tokens at once, or in chunks of 8, the other sequence getting a token in every step."""
    assert workers.run(1, served_beside_a_long_prompt, spec(), None)[0] == ([32, 2, 2, 1, 1, 1], [3, 3, 3, 1, 1, 1])
    assert workers.run(1, served_beside_a_long_prompt, spec(), 8)[0] == ([9, 9, 9, 8, 2, 2], [1, 1, 1, 3, 3, 3])


def test_recomputing_passes_early_layers_again() -> None:
    """Only what is recomputed differs: the deepest layer still sees every token once, the first one many twice."""
    lengths, _, after = workers.run(1, watched, spec(), (0.4, 0.4, 0.4), "kv_recompute")[0]
    assert all(after["4", slot] == list(range(length)) for slot, length in enumerate(lengths))
    assert all(set(after["1", slot]) == set(range(length)) for slot, length in enumerate(lengths))
    assert sum(len(after["1", slot]) for slot in range(5)) > sum(lengths)


def refusals(rank: int, spec_: ModelSpec) -> list[str]:
    stage, request = build(spec_), Request(10)
    found = []
    free, memory.free_bytes = memory.free_bytes, lambda device: 100_000
    try:
        for options, prompt in (
            (DecoderOptions("full", max_batch=64, max_tokens=32), (1, 2)),
            (DecoderOptions("full", max_tokens=4000), (1, 2)),
            (DecoderOptions("full", max_tokens=12), (1, 2, 3, 4)),
        ):
            decoder = Decoder(stage, never_exit(spec_), options)
            try:
                decoder.submit(prompt, request)
                decoder.step()
                found.append("nothing")
            except ConfigError as error:
                found.append(str(error))
    finally:
        memory.free_bytes = free
    return found


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    """A token's keys and values take 2 x 4 layers x 2 groups x 8 channels x 4 bytes = 512 bytes."""
    batch, single, request = workers.run(1, refusals, spec())[0]
    assert "decoding.max_batch=64" in batch
    assert "64 sequences of 32 tokens need 1 MB a rank, 0 MB are free" in batch
    assert "decoding.max_batch=6 or less" in batch
    assert "decoding.max_tokens=4000" in single
    assert "at most 195 tokens" in single
    assert "decoding.max_tokens=12: prompt and new tokens make 13" in request
    assert "decoding.max_tokens=13 or more" in request


def cache_sizes(rank: int, spec_: ModelSpec) -> list[tuple[int, int, int]]:
    """(sequences, tokens, bytes) of the cache with given bounds, and with what a first and a larger request need."""
    stage, sizes = build(spec_), []
    fixed = Decoder(stage, never_exit(spec_), DecoderOptions("full", max_batch=3, max_tokens=20))
    grown = Decoder(stage, never_exit(spec_), DecoderOptions("full", max_batch=2))
    for decoder, prompt in ((fixed, (1, 2)), (grown, (1, 2)), (grown, (1, 2, 3, 4)), (grown, (1,))):
        sequence = decoder.start(prompt, Request(5))
        decoder.step()
        shape = sequence.queue.kv.shape
        sizes.append((shape.sequences, shape.max_tokens, sequence.queue.kv.memory_bytes))
    return sizes


def test_memory_is_bounded_by_the_options() -> None:
    sizes = workers.run(1, cache_sizes, spec())[0]
    assert [size[:2] for size in sizes] == [(3, 20), (2, 6), (2, 8), (2, 8)]
    assert [size[2] for size in sizes] == [512 * sequences * tokens for sequences, tokens, _ in sizes]


def test_a_long_request_waits_until_the_cache_can_grow() -> None:
    """The second needs a larger cache than the first one's; both are served, one after the other."""
    spec_ = spec()
    requests = [((1, 2), Request(3)), ((1, 2, 3, 4, 5, 6), Request(6))]
    batch = Batch(spec_, never_exit(spec_), DecoderOptions("full", max_batch=2), requests, [0, 1])
    found = workers.run(1, decode_batches, [batch])[0][0]
    assert (found.most, found.ends) == (1, ["length", "length"])
