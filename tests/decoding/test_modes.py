"""All modes at any batch size: full depth's tokens where nothing exits, and each sequence as if it were alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from eellm.decoding.continuation import Request, Token
from eellm.decoding.decoder import DecoderOptions
from eellm.decoding.policy import Policy
from eellm.model.spec import ModelSpec
from tests import workers
from tests.decoding import oracle
from tests.decoding.batches import Batch, Served, decode_batches
from tests.decoding.models import policy, spec
from tests.decoding.test_decoder import HEADS, weights

PROMPTS = [(5, 17, 3, 42, 8), (60,), (9, 9, 1, 30, 22, 4, 12, 7, 55), (2, 3), (11, 40, 6), (33,), (1, 2, 3, 4, 5, 6, 7), (50, 51)]
COUNT = 12
MODES = {
    "full": DecoderOptions("full"),
    "catch_up": DecoderOptions("catch_up", max_pending=5),
    "kv_recompute": DecoderOptions("kv_recompute", max_pending=5),
    "self_speculative": DecoderOptions("self_speculative", draft_length=3),
}


def check(spec_: ModelSpec, tokens: list[list[Token]], rule: oracle.Rule) -> Counter:
    """Every prompt's greedy tokens against the plain model, which reads each text once; returns who spoke how often."""
    heads = Counter()
    for prompt, own in zip(PROMPTS, tokens, strict=True):
        wanted = oracle.follow(spec_, weights(spec_), prompt, [token.id for token in own], rule)
        assert [(token.id, token.head) for token in own] == [(token.id, token.head) for token in wanted]
        for token, exact in zip(own, wanted, strict=True):
            assert token.confidence == pytest.approx(exact.confidence, abs=2e-5)
            assert token.logprob == pytest.approx(exact.logprob, abs=2e-4)
        heads.update(token.head for token in own)
    return heads


def served(spec_: ModelSpec, policy_: Policy, options: DecoderOptions, sizes: tuple[int, ...] = (1, 3, 8)) -> list[Served]:
    """The prompts at several batch sizes."""
    requests = [(prompt, Request(COUNT)) for prompt in PROMPTS]
    batches = [Batch(spec_, policy_, replace(options, max_batch=size), requests) for size in sizes]
    found = workers.run(1, decode_batches, batches)[0]
    assert [each.most for each in found] == list(sizes)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_threshold_out_of_reach_is_full_depth(mode: str) -> None:
    spec_ = spec()
    first, *others = served(spec_, policy(spec_, "max_probability", 1.5), MODES[mode])
    assert check(spec_, first.tokens, oracle.Rule("never")) == {"final": COUNT * len(PROMPTS)}
    for other in others:
        assert ids_of(other) == ids_of(first)


@pytest.mark.parametrize("mode", ["catch_up", "kv_recompute"])
@pytest.mark.parametrize("heads", ["mixed", "block"])
def test_each_sequence_exits_on_its_own(mode: str, heads: str) -> None:
    spec_ = spec(exits=HEADS["block"]) if heads == "block" else spec()
    thresholds = dict(zip(spec_.exit_layers, (0.8, 0.35, 0.3), strict=True))
    rule = oracle.Rule("max_probability", thresholds, min_new_tokens=2, max_pending=5)
    for found in served(spec_, policy(spec_, "max_probability", tuple(thresholds.values()), least=2), MODES[mode]):
        assert len(check(spec_, found.tokens, rule)) >= 3


def ids_of(found: Served) -> list[list[int]]:
    return [[token.id for token in tokens] for tokens in found.tokens]


@pytest.mark.parametrize("heads", HEADS)
def test_drafts_change_nothing(heads: str) -> None:
    """Greedy, all kinds of heads and draft lengths, exits that are often wrong: the full model's tokens."""
    spec_ = spec(exits=HEADS[heads], init_std=0.2)
    requests = [(prompt, Request(COUNT)) for prompt in PROMPTS]
    options = [DecoderOptions("self_speculative", draft_length=length, max_batch=3) for length in (0, 1, 4, "auto")]
    eager = policy(spec_, "max_probability", 0.15)
    none, one, four, auto = workers.run(1, decode_batches, [Batch(spec_, eager, each, requests) for each in options])[0]
    check(spec_, none.tokens, oracle.Rule("never"))
    for found in (one, four, auto):
        assert ids_of(found) == ids_of(none)
        assert found is auto or 0 < found.steps.accepted < found.steps.drafted
        assert found.steps.accepted == sum(token.drafted_by is not None for tokens in found.tokens for token in tokens)
    assert none.steps.drafted == 0
    assert set(none.steps.heads) == {"final"}
