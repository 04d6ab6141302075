"""Decoding emits, token by token, what the plain model says when it reads the whole text anew for every token."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from eellm.decoding.continuation import Request
from eellm.decoding.decoder import DecoderOptions
from eellm.decoding.policy import never_exit
from eellm.model.spec import ExitSpec, ModelSpec
from tests import workers
from tests.decoding import oracle
from tests.decoding.models import BLOCKS, PROMPT, Job, Outcome, decode_all, parameters, policy, spec
from tests.engine.test_parity import VARIANTS

COUNT = 24
REQUEST = Request(COUNT)
FAMILIES = {"llama": {}, **VARIANTS}
_WEIGHTS: dict[ModelSpec, dict] = {}


def weights(spec_: ModelSpec) -> dict:
    if spec_ not in _WEIGHTS:
        _WEIGHTS[spec_] = workers.run(1, parameters, spec_)[0]
    return _WEIGHTS[spec_]


def compare(outcome: Outcome, expected: list[oracle.Expected]) -> Counter:
    """Returns who spoke how often."""
    assert [(token.id, token.head) for token in outcome.tokens] == [(token.id, token.head) for token in expected]
    for token, wanted in zip(outcome.tokens, expected, strict=True):
        assert token.confidence == pytest.approx(wanted.confidence, abs=2e-5)
        assert token.logprob == pytest.approx(wanted.logprob, abs=2e-4)
    return Counter(token.head for token in outcome.tokens)


def check(spec_: ModelSpec, rule: oracle.Rule) -> Counter:
    """Decode with a rule's policy and compare with the oracle."""
    active = tuple(rule.thresholds)
    chosen = policy(spec_, rule.kind, tuple(rule.thresholds.values()), active, rule.min_new_tokens)
    job = Job(spec_, chosen, REQUEST, DecoderOptions(max_pending=rule.max_pending))
    outcome = workers.run(1, decode_all, [job])[0][0]
    return compare(outcome, oracle.decode(spec_, weights(spec_), PROMPT, COUNT, rule))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_depth_is_the_plain_model(family: str) -> None:
    """Mode `full`, a policy that never exits and a threshold above every probability are one."""
    spec_ = spec(**FAMILIES[family])
    out_of_reach, eager = policy(spec_, "max_probability", 1.5), policy(spec_, "max_probability", 0.0)
    jobs = [
        Job(spec_, eager, REQUEST, DecoderOptions("full")),
        Job(spec_, never_exit(spec_), REQUEST),
        Job(spec_, out_of_reach, REQUEST),
    ]
    outcomes = workers.run(1, decode_all, jobs)[0]
    expected = oracle.decode(spec_, weights(spec_), PROMPT, COUNT, oracle.Rule("never"))
    for outcome in outcomes:
        assert compare(outcome, expected) == {"final": COUNT}
    assert [set(outcome.steps.heads) for outcome in outcomes] == [{"final"}, {"final"}, set(spec_.heads)]


@pytest.mark.parametrize("family", FAMILIES)
def test_catch_up_emits_what_a_forward_from_scratch_would(family: str) -> None:
    spoken = check(spec(**FAMILIES[family]), oracle.Rule("max_probability", {1: 0.5, 2: 0.4, 3: 0.5}))
    assert "final" in spoken
    assert len(spoken) >= 2  # otherwise nothing has been shown


HEADS = {
    "embedding": (ExitSpec(2, "embedding"), ExitSpec(3, "embedding", tie_output=False)),
    "norm": (ExitSpec(1, temperature=2.0), ExitSpec(3, tie_output=False)),
    "mlp": (ExitSpec(1, "mlp"), ExitSpec(2, "mlp", tie_output=False)),
    "block": BLOCKS,
    "last_layer": (ExitSpec(2), ExitSpec(4, "mlp")),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("heads", HEADS)
def test_all_heads(heads: str, tied: bool) -> None:
    exits = HEADS[heads]
    spec_ = spec(exits=exits, tie_embeddings=tied)
    spoken = check(spec_, oracle.Rule("max_probability", {exit_.layer: 0.45 for exit_ in exits}))
    assert len(spoken) >= 2, spoken


RULES = {
    "margin": oracle.Rule("margin", {1: 0.4, 2: 0.2, 3: 0.3}),
    "entropy": oracle.Rule("entropy", {1: 0.3, 2: 0.4, 3: 0.3}),
    "patience": oracle.Rule("patience", {1: 2, 2: 2, 3: 2}),
    "patience_by_exit": oracle.Rule("patience", {1: 1, 3: 1}),
    "fixed_layer": oracle.Rule("fixed_layer", {2: 0.0}),
    "one_active": oracle.Rule("max_probability", {2: 0.4}),
    "min_new_tokens": oracle.Rule("max_probability", {1: 0.5, 3: 0.4}, min_new_tokens=9),
    "max_pending_1": oracle.Rule("max_probability", {1: 0.3, 3: 0.3}, max_pending=1),
    "max_pending_3": oracle.Rule("fixed_layer", {3: 0.0}, max_pending=3),
}


@pytest.mark.parametrize("rule", RULES)
def test_all_policies(rule: str) -> None:
    agreeing = spec(exits=(ExitSpec(1), ExitSpec(2), ExitSpec(3)), init_std=0.15)
    spoken = check(agreeing if rule == "patience" else spec(), RULES[rule])
    assert len(spoken) >= 2, spoken


def test_thresholds_at_their_ends() -> None:
    """0 exits always, at the first active exit; 1 only where the probability rounds to it."""
    spec_ = spec()
    jobs = [Job(spec_, policy(spec_, "max_probability", threshold), REQUEST) for threshold in (0.0, 1.0)]
    always, certain = workers.run(1, decode_all, jobs)[0]
    assert [token.head for token in always.tokens] == ["final"] + ["exit_01"] * (COUNT - 1)
    assert all(token.head == "final" or token.confidence == 1.0 for token in certain.tokens)


def test_pending_tokens_are_bounded() -> None:
    spec_ = spec()
    eager = policy(spec_, "max_probability", 0.0)
    jobs = [Job(spec_, eager, REQUEST, DecoderOptions(max_pending=bound)) for bound in (None, 4, 1, 0)]
    free, four, one, none = workers.run(1, decode_all, jobs)[0]
    assert free.pending == list(range(COUNT))
    assert four.pending == [0] + [1, 2, 3, 4, 0] * 4 + [1, 2, 3]
    assert one.pending == [0] + [1, 0] * 11 + [1]
    assert {token.head for token in none.tokens} == {"final"}
    assert set(none.steps.heads) == {"final"}


def test_counters_by_hand() -> None:
    """Four layers, an exit after two that always fires, every third token through all: work and weights add up."""
    spec_ = spec(exits=(ExitSpec(2, "norm", tie_output=False),))
    job = Job(spec_, policy(spec_, "fixed_layer", 0.0), replace(REQUEST, max_new_tokens=7), DecoderOptions(max_pending=2))
    outcome = workers.run(1, decode_all, [job])[0][0]
    assert [token.exit_layer for token in outcome.tokens] == [4, 2, 2, 4, 2, 2, 4]
    width = spec_.hidden_size
    layer = width * spec_.head_dim * (2 * spec_.num_heads + 2 * spec_.num_query_groups) + 3 * width * spec_.ffn_hidden_size
    layer_bytes, head_bytes = 4 * (layer + 2 * width), 4 * (width * spec_.vocab_size + width)
    assert outcome.prefill.tokens == 1
    assert outcome.prefill.layer_rows == 4 * len(PROMPT)
    assert outcome.prefill.weight_bytes == 4 * layer_bytes + head_bytes
    steps = outcome.steps
    assert steps.tokens == 6
    assert steps.heads == {"exit_02": 4, "final": 2}
    assert steps.rows == {1: 6, 3: 2}  # two layers for each token, two more for three tokens at a time
    assert steps.layer_rows == 24
    assert steps.layers_per_token == 4
    assert steps.weight_bytes == (6 * 2 + 2 * 2) * layer_bytes + 6 * head_bytes


def test_end_of_text_ends() -> None:
    spec_ = spec()
    full = Job(spec_, never_exit(spec_), REQUEST)
    tokens = workers.run(1, decode_all, [full])[0][0].tokens
    eos = tokens[6].id
    first = [token.id for token in tokens].index(eos)
    ended = workers.run(1, decode_all, [replace(full, request=replace(REQUEST, eos_id=eos))])[0][0].tokens
    assert [token.id for token in ended] == [token.id for token in tokens[: first + 1]]


def test_bf16_follows_the_plain_model() -> None:
    """Every token is the plain model's, except where its best ones are within the error of bf16."""
    spec_ = spec(init_std=0.2)
    job = Job(spec_, policy(spec_, "fixed_layer", 0.0, (3,)), REQUEST, DecoderOptions(max_pending=2), dtype="bf16")
    tokens = workers.run(1, decode_all, [job])[0][0].tokens
    logits = oracle.head_logits(spec_, weights(spec_), [*PROMPT, *(token.id for token in tokens)])
    others = 0
    for place, token in enumerate(tokens, len(PROMPT) - 1):
        plain = logits[token.head][place]
        assert plain.max() - plain[token.id] < 0.3
        others += int(plain.argmax()) != token.id
        assert token.logprob == pytest.approx(plain.log_softmax(0)[token.id].item(), abs=0.3)
    assert others <= COUNT // 4
