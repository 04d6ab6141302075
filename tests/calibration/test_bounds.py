"""p-values against exact binomial sums, and their promise checked by adding up every outcome of a small experiment."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from eellm.calibration.bounds import binomial_tail, enough_sequences, fixed_sequence, hoeffding_bentkus


def exact_tail(most: int, count: int, probability: Fraction) -> Fraction:
    terms = (math.comb(count, k) * probability**k * (1 - probability) ** (count - k) for k in range(min(most, count) + 1))
    return sum(terms, Fraction(0))


@pytest.mark.parametrize("probability", [Fraction(1, 20), Fraction(1, 10), Fraction(2, 3)])
@pytest.mark.parametrize("count", [1, 7, 45, 200])
def test_the_tail_is_the_sum_of_binomial_coefficients(count: int, probability: Fraction) -> None:
    for most in {0, 1, count // 20, count // 2, count - 1, count, count + 3}:
        wanted = float(exact_tail(most, count, probability))
        assert binomial_tail(most, count, float(probability)) == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize(("most", "count", "probability"), [(950, 10**6, 0.001), (49_900, 10**6, 0.05), (3, 10**5, 0.001)])
def test_both_tails_of_many_draws_make_one(most: int, count: int, probability: float) -> None:
    """Terms there are far below the smallest float; the upper tail is the lower one of the other side of the coin."""
    lower, upper = binomial_tail(most, count, probability), binomial_tail(count - most - 1, count, 1 - probability)
    assert 0 < lower < 1
    assert lower + upper == pytest.approx(1, abs=1e-6)


def test_p_values_by_hand() -> None:
    assert hoeffding_bentkus(0.0, 45, 0.05) == pytest.approx(0.95**45), "no loss at all: e (1 - epsilon)^n is the larger"
    # 2.5 lost in 100 at epsilon 0.1: the tail up to 3, or exp(-100 KL(0.025, 0.1))
    divergence = 0.025 * math.log(0.025 / 0.1) + 0.975 * math.log(0.975 / 0.9)
    hoeffding, bentkus = math.exp(-100 * divergence), math.e * float(exact_tail(3, 100, Fraction(1, 10)))
    assert hoeffding_bentkus(2.5, 100, 0.1) == pytest.approx(min(hoeffding, bentkus))
    assert hoeffding_bentkus(2.0, 100, 0.1) == pytest.approx(math.e * float(exact_tail(2, 100, Fraction(1, 10))))
    assert hoeffding_bentkus(5.0, 100, 0.05) == 1.0, "the bound itself"
    assert hoeffding_bentkus(100.0, 100, 0.05) == 1.0
    assert hoeffding_bentkus(0.0, 0, 0.05) == 1.0


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.5])
def test_more_loss_is_less_evidence_and_more_sequences_are_more(epsilon: float) -> None:
    by_loss = [hoeffding_bentkus(total / 4, 80, epsilon) for total in range(4 * 80 + 1)]
    assert by_loss == sorted(by_loss)
    assert len(set(by_loss)) > 8
    by_count = [hoeffding_bentkus(0.0, count, epsilon) for count in range(1, 90)]
    assert by_count == sorted(by_count, reverse=True)
    by_bound = [hoeffding_bentkus(2.0, 80, bound / 100) for bound in range(1, 100)]
    assert by_bound == sorted(by_bound, reverse=True)


@pytest.mark.parametrize("size", [1.0, 0.5, 0.21])
@pytest.mark.parametrize("epsilon", [Fraction(1, 20), Fraction(1, 10)])
@pytest.mark.parametrize("count", [10, 60, 150])
def test_a_true_hypothesis_is_rejected_no_more_often_than_promised(count: int, epsilon: Fraction, size: float) -> None:
    """Each sequence loses `size` or nothing, epsilon on average: P(p <= u) <= u at every u that p takes."""
    probability = epsilon / Fraction(size)
    weight = [math.comb(count, k) * probability**k * (1 - probability) ** (count - k) for k in range(count + 1)]
    values = [hoeffding_bentkus(k * size, count, float(epsilon)) for k in range(count + 1)]
    for value in set(values):
        reached = sum((w for w, other in zip(weight, values, strict=True) if other <= value), Fraction(0))
        assert float(reached) <= value * (1 + 1e-9)


def test_the_sequence_stops_at_the_first_that_is_not_rejected() -> None:
    assert fixed_sequence([0.01, 0.1, 0.11, 0.001], 0.1) == 2
    assert fixed_sequence([0.2, 0.0], 0.1) == 0
    assert fixed_sequence([0.05, 0.05], 0.1) == 2
    assert fixed_sequence([], 0.1) == 0


def test_how_many_sequences_are_enough() -> None:
    assert enough_sequences(0.0, 0.05, 0.1) == 45
    assert hoeffding_bentkus(0.0, 45, 0.05) <= 0.1 < hoeffding_bentkus(0.0, 44, 0.05)
    for risk in (0.01, 0.03, 0.045):
        count = enough_sequences(risk, 0.05, 0.1)
        assert count is not None
        assert hoeffding_bentkus(risk * count, count, 0.05) <= 0.1
    assert enough_sequences(0.05, 0.05, 0.1) is None
