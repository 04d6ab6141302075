"""Every token passes every layer once and in order, and leaves the keys and values that full decoding leaves."""

from __future__ import annotations

import pytest
import torch

from eellm.decoding.continuation import Continuation, Request
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.model.lean_layer import DecodingContext, LeanLayer
from eellm.decoding.policy import never_exit
from eellm.model.spec import ModelSpec
from tests import workers
from tests.decoding.models import BLOCKS, PROMPT, build, policy, spec, watching

COUNT = 20
CASES = {
    "mixed_heads": (spec(), (0.5, 0.4, 0.5), DecoderOptions()),
    "blocks_and_bound": (spec(exits=BLOCKS), (0.6, 0.4, 0.3), DecoderOptions(max_pending=4)),
    "blocks_and_late_exits": (spec(exits=BLOCKS), (0.2, 0.2, 0.2), DecoderOptions()),
    "window": (spec(sliding_window=6, exits=BLOCKS), (0.4, 0.4, 0.4), DecoderOptions()),
    "recomputed": (spec(exits=BLOCKS), (0.2, 0.2, 0.2), DecoderOptions("kv_recompute")),
    "drafts_rejected": (spec(exits=BLOCKS[:2]), (0.3, 0.3), DecoderOptions("self_speculative", draft_length=3)),
    "learned": (spec(norm="layernorm", position="learned", activation="gelu"), (0.3, 0.3, 0.3), DecoderOptions()),
}


def follow(decoder: Decoder, ids: list[int]) -> Continuation:
    """Take a decoder through given tokens."""
    sequence = decoder.start(PROMPT, Request(COUNT))
    for id_ in ids:
        decoder.step()
        sequence.replace(len(sequence.tokens) - 1, id_)
    return sequence


def compare_caches(rank: int, spec_: ModelSpec, thresholds: tuple[float, ...], options: DecoderOptions) -> dict:
    """Largest difference by layer between the drained cache and full decoding's, and who spoke."""
    stage = build(spec_)
    early = Decoder(stage, policy(spec_, "max_probability", thresholds, least=3), options)
    tokens = list(early.generate(PROMPT, Request(COUNT)))
    cache = early.running[0].queue.kv
    unfinished = {layer: cache.filled(layer) for layer in cache.layers}
    early.drain()
    # the oracle is a decoder that evaluates every exit and trusts none, so that blocks have caches there too
    full = Decoder(stage, policy(spec_, "max_probability", 1.5))
    exact_cache = follow(full, [token.id for token in tokens]).queue.kv
    difference = {}
    for layer in cache.layers:
        for own, exact in zip(cache.read(layer), exact_cache.read(layer), strict=True):
            assert own.shape == exact.shape == (spec_.num_query_groups, len(PROMPT) + COUNT - 1, spec_.head_dim)
            difference[layer] = max(difference.get(layer, 0.0), ((own - exact).abs().max() / exact.abs().max()).item())
    return {"difference": difference, "unfinished": unfinished, "heads": {token.drafted_by or token.head for token in tokens}}


@pytest.mark.parametrize("case", CASES)
def test_keys_and_values_are_those_of_full_decoding(case: str) -> None:
    found = workers.run(1, compare_caches, *CASES[case])[0]
    assert len(found["heads"]) >= 2
    assert len(set(found["unfinished"].values())) >= 2, "nothing was pending"
    assert len(found["difference"]) == 4 + sum(exit_.head == "block" for exit_ in CASES[case][0].exits)
    assert max(found["difference"].values()) < 1e-4


def passages(rank: int, spec_: ModelSpec, thresholds: tuple[float, ...]) -> tuple[dict, dict]:
    """Layer name -> positions that went through it, in order, after decoding and after draining."""
    stage = build(spec_)
    seen: dict[str, list[int]] = {}
    angles = torch.outer(torch.arange(64.0), torch.ones(1)).cos()

    def record(layer: LeanLayer, context: DecodingContext) -> None:
        # the first rotary channel turns by one radian a position: it tells where a token stands
        first = context.cos[:, 0, 0, :1]
        seen.setdefault(layer.name, []).extend((first - angles.t()).abs().argmin(1).tolist())

    decoder = Decoder(stage, policy(spec_, "max_probability", thresholds))
    with watching(record):
        list(decoder.generate(PROMPT, Request(COUNT)))
        before = {name: list(positions) for name, positions in seen.items()}
        decoder.drain()
    return before, seen


def test_every_token_passes_every_layer_once_in_order() -> None:
    spec_ = spec(exits=BLOCKS)
    before, after = workers.run(1, passages, spec_, (0.6, 0.4, 0.3))[0]
    everything = list(range(len(PROMPT) + COUNT - 1))
    assert set(after) == {"1", "2", "3", "4", "exit_01", "exit_02", "exit_04"}
    for name, positions in before.items():
        assert positions == everything[: len(positions)], name
        assert after[name] == everything, name
    assert len(before["1"]) == len(everything) > len(before["4"])


def after_the_prompt(rank: int, spec_: ModelSpec, active: tuple[int, ...]) -> dict[str, int]:
    """Tokens in each cache once the prompt is through."""
    decoder = Decoder(build(spec_), policy(spec_, "max_probability", 0.5, active))
    sequence = decoder.start(PROMPT, Request(3))
    decoder.step()
    kv = sequence.queue.kv
    return {layer: kv.filled(layer) for layer in kv.layers}


def test_a_prompt_passes_everything_and_only_active_blocks_have_a_cache() -> None:
    found = workers.run(1, after_the_prompt, spec(exits=BLOCKS), (2,))[0]
    assert found == dict.fromkeys(["1", "2", "3", "4", "exit_02"], len(PROMPT))


def one_decoder_many_prompts(rank: int, spec_: ModelSpec) -> tuple[list, list, float]:
    """A long and a short sequence from a decoder used before, and from fresh ones; and the cache's size."""
    stage = build(spec_)
    chosen = policy(spec_, "max_probability", 0.4)
    used, requests = Decoder(stage, chosen), [((9, 1), 12), (PROMPT, COUNT), ((30,), 5)]
    again = [[token.id for token in used.generate(prompt, Request(count))] for prompt, count in requests]
    fresh = [[token.id for token in Decoder(stage, chosen).generate(prompt, Request(count))] for prompt, count in requests]
    return again, fresh, used.running[0].queue.kv.memory_bytes


def test_a_sequence_leaves_nothing_behind() -> None:
    spec_ = spec(exits=BLOCKS)
    again, fresh, size = workers.run(1, one_decoder_many_prompts, spec_)[0]
    assert again == fresh
    rows = len(PROMPT) + COUNT - 1
    assert size == 2 * 4 * 7 * rows * spec_.num_query_groups * spec_.head_dim


def refuse(rank: int, spec_: ModelSpec, count: int) -> str | None:
    decoder = Decoder(build(spec_), never_exit(spec_))
    try:
        return str(len(list(decoder.generate(PROMPT, Request(count)))))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_learned_positions_bound_the_text() -> None:
    spec_ = spec(position="learned", max_positions=16)
    assert workers.run(1, refuse, spec_, 12)[0] == "12"
    refused = workers.run(1, refuse, spec_, 13)[0]
    assert refused.startswith("ConfigError")
    assert "make 17" in refused
    assert "16 positions" in refused
