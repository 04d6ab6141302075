"""Drafts are accepted and rejected so that what comes out is the full model's distribution, and are counted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from eellm.decoding.continuation import Continuation, Request
from eellm.decoding.decoder import DecoderOptions
from eellm.decoding.reading import Reading
from eellm.decoding.sampling import SamplingOptions, choose, distribution, uniform
from eellm.decoding.speculative import _verdict
from eellm.model.spec import ExitSpec, ModelSpec
from tests import workers
from tests.decoding import oracle
from tests.decoding.alone import reading
from tests.decoding.batches import Batch, Served, decode_batches
from tests.decoding.models import policy, spec
from tests.decoding.test_decoder import weights

FINAL = torch.tensor([[0.3, -1.0, 1.7, 0.9, -3.0, 1.1, 0.0, 2.2]])
DRAFT = torch.tensor([[1.3, 0.5, 0.2, 0.9, -1.0, -2.0, 0.7, 2.9]])


def chi_square(counts: dict, shares: dict, total: int) -> tuple[float, int]:
    """(statistic, cells) over outcomes that are expected at least four times; the others make one cell."""
    statistic, cells, rest, seen = 0.0, 0, 0.0, 0
    for outcome, share in shares.items():
        if share * total >= 4:
            statistic, cells = statistic + (counts.get(outcome, 0) - share * total) ** 2 / (share * total), cells + 1
        else:
            rest, seen = rest + share * total, seen + counts.get(outcome, 0)
    return (statistic + (seen - rest) ** 2 / rest, cells + 1) if rest >= 4 else (statistic, cells)


def acceptable(statistic: float, cells: int) -> bool:
    """Within 4.5 standard deviations of a chi-square distribution."""
    return statistic < cells + 4.5 * math.sqrt(2 * cells)


@pytest.mark.parametrize("options", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 4, 1.0), (1.2, 0, 0.8)])
def test_verdicts_follow_the_final_head_whatever_the_draft(options: tuple[float, int, float]) -> None:
    """1500 seeds: the draft from one distribution, the outcome from the other; kept as often as the two overlap."""
    sampling, final, draft, count = SamplingOptions(*options), reading(FINAL), reading(DRAFT), 1500
    counts: dict[int, int] = {}
    kept = 0
    for seed in range(count):
        sequence = Continuation(Request(9, sampling, seed), (1, 2, 3))
        drafted = choose(draft, sampling, uniform(seed, 3, "draft"))[0]
        token, accepted = _verdict(sequence, drafted, draft, final)
        assert accepted == (token == drafted)
        counts[token] = counts.get(token, 0) + 1
        kept += accepted
    wanted, shares = (distribution(each, sampling) for each in (final, draft))
    outcomes = {token: share for token, share in enumerate(wanted.tolist()) if share > 0}
    assert set(counts) <= set(outcomes)
    assert acceptable(*chi_square(counts, outcomes, count))
    overlap = torch.minimum(wanted, shares).sum().item()
    assert abs(kept / count - overlap) < 4.5 * math.sqrt(overlap * (1 - overlap) / count)
    assert 0.2 < overlap < 0.95


@pytest.mark.parametrize("options", [(1.0, 0, 1.0), (0.6, 3, 1.0), (1.2, 0, 0.8), (0.0, 0, 1.0)])
def test_the_distribution_is_what_choose_draws_from(options: tuple[float, int, float]) -> None:
    at, sampling, draws = reading(FINAL), SamplingOptions(*options), 2000
    chosen = torch.zeros(FINAL.shape[1], dtype=torch.float64)
    for number in range(draws):
        chosen[choose(at, sampling, (number + 0.5) / draws)[0]] += 1 / draws
    torch.testing.assert_close(distribution(at, sampling), chosen, atol=2e-3, rtol=0)


def test_greedy_verdicts() -> None:
    sequence = Continuation(Request(9), (1, 2, 3))
    agreeing, other = reading(DRAFT), reading(FINAL.flip(1))
    assert _verdict(sequence, 7, agreeing, reading(FINAL)) == (7, True)
    assert _verdict(sequence, 0, other, reading(FINAL)) == (7, False)


def identical(rank: int) -> list[bool]:
    at: Reading = reading(FINAL)
    sampling = SamplingOptions(1.0)
    found = []
    for seed in range(200):
        sequence = Continuation(Request(9, sampling, seed), (1,))
        found.append(_verdict(sequence, choose(at, sampling, uniform(seed, 1, "draft"))[0], at, at)[1])
    return found


def test_a_draft_from_the_same_distribution_is_always_accepted() -> None:
    assert all(identical(0))


def sampled(spec_: ModelSpec, prompt: tuple[int, ...], count: int) -> Served:
    requests = [(prompt, Request(3, SamplingOptions(1.0), seed)) for seed in range(count)]
    options = DecoderOptions("self_speculative", draft_length=2, max_batch=64)
    return workers.run(1, decode_batches, [Batch(spec_, policy(spec_, "fixed_layer", 0.0), options, requests)])[0][0]


def test_sampled_texts_follow_the_full_model() -> None:
    """Chi-square of whole texts of three tokens over 800 seeds; the second and third are drafted at an exit."""
    spec_, prompt, count = spec(vocab_size=4, padded_vocab_size=8, exits=(ExitSpec(2),), init_std=0.25), (1, 3, 2), 800
    found = sampled(spec_, prompt, count)
    shares = {}
    for first, second in itertools.product(range(4), repeat=2):
        logits = oracle.head_logits(spec_, weights(spec_), [*prompt, first, second])["final"]
        after = [logits[place].softmax(0).tolist() for place in (-3, -2, -1)]
        for third in range(4):
            shares[first, second, third] = after[0][first] * after[1][second] * after[2][third]
    counts: dict = {}
    for tokens in found.tokens:
        text = tuple(token.id for token in tokens)
        counts[text] = counts.get(text, 0) + 1
    statistic, cells = chi_square(counts, shares, count)
    assert cells >= 20
    assert acceptable(statistic, cells)
    assert 0.1 < found.steps.acceptance_rate < 0.99, "otherwise one of the branches has hardly been taken"


def test_acceptance_by_hand() -> None:
    """An exit that always drafts: which drafts survive follows from the plain model's predictions along its own text."""
    spec_, prompt, count, length = spec(exits=(ExitSpec(3),), init_std=0.2), (5, 17, 3), 24, 3
    options = DecoderOptions("self_speculative", draft_length=length)
    batch = Batch(spec_, policy(spec_, "fixed_layer", 0.0), options, [(prompt, Request(count))])
    found = workers.run(1, decode_batches, [batch])[0][0]
    ids = [token.id for token in found.tokens[0]]
    logits = oracle.head_logits(spec_, weights(spec_), [*prompt, *ids])
    exit_, final = (logits[name].argmax(1).tolist()[len(prompt) - 1 :] for name in ("exit_03", "final"))
    assert ids == final[:count]
    drafted = accepted = verifications = 0
    drafted_by: list[str | None] = [None]
    while len(drafted_by) < count:
        first = len(drafted_by)
        drafts = min(length, count - first - 1)
        matches = list(itertools.takewhile(lambda place: exit_[place] == final[place], range(first, first + drafts)))
        drafted, accepted, verifications = drafted + drafts, accepted + len(matches), verifications + int(drafts > 0)
        drafted_by += ["exit_03"] * len(matches) + [None]
    assert [token.drafted_by for token in found.tokens[0]] == drafted_by
    steps = found.steps
    assert (steps.drafted, steps.accepted, steps.verifications) == (drafted, accepted, verifications)
    assert 0 < accepted < drafted
    assert steps.acceptance_rate == accepted / drafted
    assert steps.mean_accepted_length == accepted / verifications
    assert steps.heads["exit_03"] == drafted
    assert steps.heads["final"] == drafted + verifications + drafted_by[1:].count(None) - verifications
