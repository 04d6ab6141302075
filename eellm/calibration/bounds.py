"""How sure a sample makes us that a risk is small, and how far down a list of thresholds that carries.

The risk of a threshold is the mean of a loss in 0..1 over the sequences that could have been drawn. Learn-then-Test
(Angelopoulos et al., arXiv 2110.01052) tests for each threshold the hypothesis "its risk exceeds epsilon": a small
p-value speaks against it. Nothing is asked of the losses but that they are drawn independently and lie in 0..1; the
risk need not even fall as the threshold rises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def hoeffding_bentkus(total: float, count: int, epsilon: float) -> float:
    """p-value of "the mean loss exceeds epsilon" where `count` losses, each in 0..1, add up to `total`.

    The smaller of Hoeffding's bound in its relative-entropy form and Bentkus's e P(Bin(count, epsilon) <= ceil(total)):
    Bates et al., arXiv 2101.02703, section 3.1, and section 3.1 of Learn-then-Test. Under the hypothesis it is at most u
    with probability at most u, for every u. 0 < epsilon < 1; with no losses it is 1.
    """
    if count == 0:
        return 1.0
    hoeffding = math.exp(-count * relative_entropy(min(total / count, epsilon), epsilon))
    bentkus = math.e * binomial_tail(math.ceil(total), count, epsilon)
    return min(1.0, hoeffding, bentkus)


def relative_entropy(a: float, b: float) -> float:
    """Nats between coins that show heads with probability a in 0..1 and b in 0..1, ends excluded."""
    heads = a * math.log(a / b) if a > 0 else 0.0
    tails = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return heads + tails


def binomial_tail(most: int, count: int, probability: float) -> float:
    """P(Bin(count, probability) <= most), summed as logarithms, which neither vanish nor overflow."""
    if most >= count:
        return 1.0
    up_to = np.arange(1, most + 1, dtype=np.float64)
    # from each term of the sum to the next
    ratios = np.log((count - up_to + 1) / up_to) + math.log(probability) - math.log1p(-probability)
    terms = count * math.log1p(-probability) + np.concatenate([[0.0], np.cumsum(ratios)])
    return min(1.0, math.exp(np.logaddexp.reduce(terms)))


def fixed_sequence(p_values: Sequence[float], delta: float) -> int:
    """How many hypotheses, from the first one on, are rejected: all before the first p-value above delta.

    The probability that any of them is true is at most delta whatever their number, because their order was fixed before
    the sample was seen (Learn-then-Test, section 3.2). A small p-value behind a large one counts for nothing.
    """
    return next((number for number, p_value in enumerate(p_values) if p_value > delta), len(p_values))


def enough_sequences(risk: float, epsilon: float, delta: float) -> int | None:
    """Sequences that certify epsilon where they measure this risk; None where no number does.

    By Hoeffding's bound alone, so that fewer may do.
    """
    if risk >= epsilon:
        return None
    return math.ceil(math.log(1 / delta) / relative_entropy(risk, epsilon))
