"""Log-likelihoods at a threshold are what a decoder would have said along the text, and at full depth the plain model's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows

from eellm.decoding.policy import never_exit
from eellm.harness.windows import Window, windows
from eellm.model.spec import ModelSpec
from tests import workers
from tests.decoding import oracle
from tests.decoding.models import BLOCKS, policy, spec
from tests.decoding.test_decoder import weights
from tests.harness.answers import Job, Letters, answers, followed, log_likelihood, scores, setting

SPEC = spec()
PAIRS = [
    ("def main(", "self, x)"),
    ("a", "b"),
    ("import o", "s"),
    ("import o", "t"),
    ("two words", " and three more"),
    ("ab", "x"),
]
ROLLING = [("a text to be read",), ("x",), ("",), ("one two three four five six seven eight nine ten eleven twelve",)]

POLICIES = {
    "max_probability": policy(SPEC, "max_probability", (0.5, 0.4, 0.5)),
    "margin": policy(SPEC, "margin", 0.2),
    "entropy": policy(SPEC, "entropy", 0.35),
    "patience": policy(SPEC, "patience", (2.0, 2.0, 1.0)),
    "fixed_layer": policy(SPEC, "fixed_layer", 0.0, active=(2,)),
}


def ids(text: str, spec_: ModelSpec = SPEC) -> list[int]:
    return Letters(spec_.vocab_size).encode(text)


def plain(spec_: ModelSpec, context: list[int], text: list[int]) -> tuple[float, bool]:
    """The oracle: log-softmax of a plain forward over everything, in fp64."""
    logits = oracle.head_logits(spec_, weights(spec_), [*context, *text])["final"]
    return log_likelihood(logits[len(context) - 1 : -1], text)


def same(answer: tuple[float, bool], expected: tuple[float, bool]) -> None:
    assert answer[0] == pytest.approx(expected[0], abs=2e-4 * max(1.0, abs(expected[0])))
    assert answer[1] == expected[1]


def test_full_depth_is_the_plain_model() -> None:
    """So are no exits, a threshold out of reach, and speculation, whatever its drafts."""
    eager = policy(SPEC, "max_probability", 0.0)
    settings = [
        setting(never_exit(SPEC), mode="full"),
        setting(eager, mode="full"),
        setting(eager, mode="self_speculative"),
        setting(eager, max_pending=0),
        setting(policy(SPEC, "max_probability", 1.5)),
    ]
    likely = greedy_text(4)
    job = Job(SPEC, settings, "loglikelihood", [*PAIRS, ("def main(", likely)])
    for found, usage in workers.run(1, answers, job)[0]:
        for (context, text), answer in zip(job.requests, found, strict=True):
            same(answer, plain(SPEC, ids(context), ids(text)))
        assert [greedy for _, greedy in found] == [False] * len(PAIRS) + [True]
        assert usage.mean_layers == SPEC.num_layers
        assert usage.scored.tokens == sum(len(text) for _, text in job.requests)
        assert usage.generated.tokens == usage.cut == 0


def greedy_text(count: int) -> str:
    """What full depth writes behind "def main("."""
    tokens = oracle.decode(SPEC, weights(SPEC), tuple(ids("def main(")), count, oracle.Rule("never"))
    text = Letters(SPEC.vocab_size).decode([token.id for token in tokens])
    assert ids(text) == [token.id for token in tokens]
    return text


@pytest.mark.parametrize("kind", POLICIES)
def test_a_threshold_scores_by_the_heads_that_a_decoder_would_have_let_speak(kind: str) -> None:
    chosen = POLICIES[kind]
    settings = [
        setting(chosen),
        setting(chosen, max_pending=2),
        setting(replace(chosen, min_new_tokens=4)),
        setting(chosen, mode="kv_recompute"),
    ]
    check(Job(SPEC, settings, "loglikelihood", [pair for pair in PAIRS if len(pair[0]) > 1]))


def test_exits_that_are_layers_of_their_own() -> None:
    blocks = spec(exits=BLOCKS)
    check(Job(blocks, [setting(policy(blocks, "max_probability", 0.4)), setting(policy(blocks, "margin", 0.1), max_pending=1)],
              "loglikelihood", PAIRS[:1] + PAIRS[2:]))  # fmt: skip


def check(job: Job) -> None:
    """Answers against a decoder that follows every text token by token."""
    found = workers.run(1, answers, job)[0]
    pairs = [(ids(context, job.spec), ids(text, job.spec)) for context, text in job.requests]
    # two tokens of a setting's min_new_tokens pass before the text begins: the context's last, and the one it is replaced by
    texts = [replace(own, policy=replace(own.policy, min_new_tokens=own.policy.min_new_tokens and own.policy.min_new_tokens + 1))
             for own in job.settings]  # fmt: skip
    said = workers.run(1, followed, replace(job, settings=texts), pairs)[0]
    spoke: set[str] = set()
    for (given, usage), along in zip(found, said, strict=True):
        layers = 0
        for (_, text), answer, tokens in zip(pairs, given, along, strict=True):
            greedy = [token.id for token in tokens] == text
            same(answer, (likelihood(job.spec, _, text, [token.head for token in tokens]), greedy))
            layers += sum(token.exit_layer for token in tokens)
            spoke |= {token.head for token in tokens}
        assert usage.layers == layers
    assert len(spoke) > 1, "otherwise nothing has been shown"


def likelihood(spec_: ModelSpec, context: list[int], text: list[int], heads: list[str]) -> float:
    """Sum of the labels' log-probabilities under the heads that spoke, from a plain forward."""
    logits, total = oracle.head_logits(spec_, weights(spec_), [*context, *text]), 0.0
    for place, (head, label) in enumerate(zip(heads, text, strict=True), start=len(context) - 1):
        temperature = next((exit_.temperature for exit_ in spec_.exits if exit_.name == head), 1.0)
        total += float((logits[head][place] * temperature).log_softmax(0)[label])
    return total


def test_neither_batch_nor_chunk_changes_a_score() -> None:
    rows = [Window(tuple(ids("abcdefghij"[:length])), tuple(ids("klmnop"[: 1 + length // 2]))) for length in (10, 3, 7, 10, 1)]
    job = Job(SPEC, [setting(policy(SPEC, "max_probability", 0.5))], "loglikelihood", [])
    wanted = workers.run(1, scores, replace(job, batch_size=1, chunk=1000), rows)[0]
    for batch_size, chunk in ((5, 1000), (2, 4)):
        for own, alone in zip(
            workers.run(1, scores, replace(job, batch_size=batch_size, chunk=chunk), rows)[0], wanted, strict=True
        ):
            torch.testing.assert_close(own.values, alone.values, atol=1e-4, rtol=1e-4)
            assert own.values.shape == (4, 6, len(alone.loss[0]))


def test_rolling_is_the_sum_over_the_harness_s_own_windows() -> None:
    longest = 16
    job = Job(SPEC, [setting(never_exit(SPEC))], "loglikelihood_rolling", ROLLING, longest)
    ((found, usage),) = workers.run(1, answers, job)[0]
    for (text,), answer in zip(ROLLING, found, strict=True):
        cut = get_rolling_token_windows(ids(text), 0, longest, 1)
        assert answer == pytest.approx(
            sum(plain(SPEC, inputs[: len(inputs) - len(labels) + 1], labels)[0] for inputs, labels in cut), abs=1e-3
        )
    assert usage.scored.tokens == sum(len(text) for (text,) in ROLLING)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 20, 33])
def test_windows_are_the_harness_s(length: int) -> None:
    text = list(range(1, length + 1))
    wanted = [Window(tuple(inputs), tuple(labels)) for inputs, labels in get_rolling_token_windows(text, 0, 8, 1)]
    assert list(windows([0], text, 8)) == wanted


def test_a_long_context_loses_its_beginning_and_a_long_text_nothing() -> None:
    assert list(windows([1, 2, 3, 4, 5], [6, 7], 4)) == [Window((3, 4, 5, 6), (6, 7))]
    assert list(windows([1, 2, 3], [4, 5, 6, 7, 8], 3)) == [Window((3, 4, 5), (4, 5, 6)), Window((5, 6, 7), (7, 8))]
    longest = 8
    job = Job(SPEC, [setting(never_exit(SPEC))], "loglikelihood", [("a long context", "text"), ("short", "text")], longest)
    ((found, usage),) = workers.run(1, answers, job)[0]
    same(found[0], plain(SPEC, ids("a long context")[-5:], ids("text")))
    same(found[1], plain(SPEC, ids("short"), ids("text")))
    assert usage.cut == 1


def test_an_empty_context_is_the_end_of_a_document() -> None:
    job = Job(SPEC, [setting(never_exit(SPEC))], "loglikelihood", [("", "text"), ("  ", "text")])
    ((found, _),) = workers.run(1, answers, job)[0]
    same(found[0], plain(SPEC, [0], ids("text")))
    same(found[1], plain(SPEC, [0], ids("  text")))


@pytest.mark.dist
def test_tensor_parallel_ranks_answer_alike() -> None:
    settings = [setting(never_exit(SPEC)), setting(policy(SPEC, "max_probability", 0.5), max_pending=3)]
    job = Job(SPEC, settings, "loglikelihood", PAIRS)
    wanted = workers.run(1, answers, job)[0]
    for ranks in workers.run(2, answers, replace(job, tp=2)):
        for (own, usage), (alone, other) in zip(ranks, wanted, strict=True):
            for answer, expected in zip(own, alone, strict=True):
                same(answer, expected)
            assert usage.layers == other.layers
