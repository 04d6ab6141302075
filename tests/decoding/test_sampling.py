"""Sampled tokens follow the distribution that was asked for, and depend on seed and position alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from eellm.decoding.continuation import Request
from eellm.decoding.decoder import DecoderOptions
from eellm.decoding.sampling import SamplingOptions, choose, uniform
from eellm.model.spec import ExitSpec
from tests import workers
from tests.decoding import oracle
from tests.decoding.alone import reading
from tests.decoding.models import Job, decode_all, policy, spec
from tests.decoding.test_decoder import weights

LOGITS = torch.tensor([[0.3, -1.0, 1.7, 0.9, -3.0, 1.1, 0.0, 2.2]])


def chosen_distribution(options: SamplingOptions, draws: int = 1 << 14) -> torch.Tensor:
    """Share of evenly spread draws that choose each token: the distribution itself, to 1 / draws a token."""
    at = reading(LOGITS)
    counts = torch.zeros(LOGITS.shape[1])
    for number in range(draws // 8):
        counts[choose(at, options, (number + 0.5) * 8 / draws)[0]] += 1
    return counts / counts.sum()


def warped(temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution by its definition, with sorted Python lists."""
    logits = LOGITS[0].tolist()
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = order[: top_k or len(order)]
    masses = {token: math.exp(logits[token] / temperature) for token in order}
    whole, kept, reached = sum(masses.values()), [], 0.0
    for token in order:
        if reached >= top_p * whole:
            break
        kept.append(token)
        reached += masses[token]
    return torch.tensor([masses[token] / reached if token in kept else 0.0 for token in range(len(logits))])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (3.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.8), (0.7, 5, 0.9), (1.0, 1, 1.0), (1.0, 0, 0.1)],
)
def test_draws_cover_exactly_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    shares = chosen_distribution(SamplingOptions(temperature, top_k, top_p))
    torch.testing.assert_close(shares, warped(temperature, top_k, top_p), atol=2e-3, rtol=0)


def test_top_p_of_a_flat_distribution_goes_beyond_the_first_candidates() -> None:
    """1000 tokens, all but equal: the nucleus of 0.9 holds 900 of them."""
    logits = torch.linspace(1e-4, 0.0, 1000).unsqueeze(0)
    tokens = [choose(reading(logits), SamplingOptions(1.0, 0, 0.9), draw)[0] for draw in (0.0, 0.5, 0.9999999)]
    assert tokens == pytest.approx([0, 450, 899], abs=1)


def test_numbers_are_uniform_and_independent() -> None:
    """Chi-square over 16 cells, for positions of one seed, seeds at one position, and pairs of neighbouring positions."""
    count, cells = 4096, 16
    bound = 50.0  # the 99.999th percentile with 15 degrees of freedom is 47.6
    by_position = [uniform(7, position) for position in range(count)]
    by_seed = [uniform(seed, 7) for seed in range(count)]
    pairs = [(math.floor(a * 4), math.floor(b * 4)) for a, b in itertools.pairwise(by_position)]
    for numbers in (by_position, by_seed, [(4 * a + b) / 16 for a, b in pairs]):
        counts = torch.bincount((torch.tensor(numbers) * cells).long(), minlength=cells).double()
        expected = len(numbers) / cells
        assert len(counts) == cells
        assert ((counts - expected).square() / expected).sum() < bound
    assert uniform(7, 3) == by_position[3] != uniform(8, 3)


def test_sampled_tokens_of_a_model_follow_its_softmax() -> None:
    """Chi-square of the second token over 400 seeds, at an exit, against the plain model's softmax."""
    spec_ = spec(vocab_size=6, padded_vocab_size=8, exits=(ExitSpec(2, temperature=1.5),), init_std=0.25)
    request = Request(2, SamplingOptions(1.0))
    fixed = Job(spec_, policy(spec_, "fixed_layer", 0.0), request, prompt=(1, 4, 2))
    jobs = [replace(fixed, request=replace(request, seed=seed)) for seed in range(400)]
    outcomes = workers.run(1, decode_all, jobs)[0]
    first, statistic, cells = {}, 0.0, 0
    for outcome in outcomes:
        first.setdefault(outcome.tokens[0].id, []).append(outcome.tokens[1])
    for id_, seconds in first.items():
        # the exit's temperature is that of its confidence; the draw is from the softmax of its logits
        logits = oracle.head_logits(spec_, weights(spec_), [1, 4, 2, id_])["exit_02"][-1] * 1.5
        expected = logits.softmax(0) * len(seconds)
        counts = torch.bincount(torch.tensor([token.id for token in seconds]), minlength=6)
        for count, wanted in zip(counts.tolist(), expected.tolist(), strict=True):
            if wanted >= 4:
                statistic, cells = statistic + (count - wanted) ** 2 / wanted, cells + 1
        for token in seconds:
            assert token.logprob == pytest.approx(logits.log_softmax(0)[token.id].item(), abs=1e-4)
    assert cells >= 8
    assert statistic < cells + 4.5 * math.sqrt(2 * cells)


@pytest.mark.parametrize("sampling", [SamplingOptions(0.9), SamplingOptions(1.3, 8, 0.9)], ids=["plain", "top"])
def test_a_request_depends_on_its_seed_alone(sampling: SamplingOptions) -> None:
    """The same request alone, after others, and with other requests' options around it."""
    spec_ = spec()
    request = Request(12, sampling, seed=5)
    job = Job(spec_, policy(spec_, "max_probability", 0.5), request, DecoderOptions(max_pending=4))
    other = replace(job, request=Request(7, SamplingOptions(2.0), seed=6), prompt=(1, 2))
    alone = workers.run(1, decode_all, [job])[0][0]
    first, _, again, reseeded = workers.run(1, decode_all, [job, other, job, replace(job, request=replace(request, seed=4))])[0]
    assert alone.tokens == first.tokens == again.tokens
    assert alone.tokens != reseeded.tokens
    assert len({token.head for token in alone.tokens}) >= 2
