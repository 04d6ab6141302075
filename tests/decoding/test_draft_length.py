"""The length of drafts: expected tokens and costs against a simulation, and what the choice costs where drafts fail."""

from __future__ import annotations

import itertools

import pytest

from eellm.decoding.draft_length import MAX_DRAFTS, AdaptiveLength, DraftCosts, measured_curve, tokens_per_cost
from eellm.decoding.model.segments import InferenceModel
from tests import workers
from tests.decoding.models import build, spec

COSTS = DraftCosts(heads=2.0, early=10.0, late=20.0)
FULL = COSTS.verification(0)


def expectation(limit: int, drafts: float, accepts: float, costs: DraftCosts) -> float:
    """Tokens over cost by going through all outcomes of a round."""
    tokens = cost = 0.0
    for made in range(limit + 1):
        likely = drafts**made * (1.0 if made == limit else 1 - drafts)
        attempts = min(made + 1, limit)
        cost += likely * (attempts * costs.heads + made * costs.early + costs.verification(made))
        for outcomes in itertools.product([True, False], repeat=made):
            kept = len(list(itertools.takewhile(bool, outcomes)))
            chance = accepts ** sum(outcomes) * (1 - accepts) ** (made - sum(outcomes))
            tokens += likely * chance * (kept + 1)
    return tokens / cost


@pytest.mark.parametrize("limit", [0, 1, 3, 5])
@pytest.mark.parametrize(("drafts", "accepts"), [(1.0, 0.5), (0.7, 0.9), (0.2, 0.0), (0.0, 0.3)])
def test_a_rounds_yield(limit: int, drafts: float, accepts: float) -> None:
    costs = DraftCosts(2.0, 10.0, 20.0, tuple(1 + 0.1 * rows for rows in range(MAX_DRAFTS + 1)))
    assert tokens_per_cost(limit, drafts, accepts, costs) == pytest.approx(expectation(limit, drafts, accepts, costs))


class ScriptedClock:
    """Nothing is timed while the first round warms up; then rows pass in rows + 0, rows + 7 and rows + 1."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, -MAX_DRAFTS - 1

    def __call__(self) -> float:
        round_, place = divmod(self.calls // 2, MAX_DRAFTS + 1)
        if self.calls > 0 and self.calls % 2:  # the end of a pass
            self.now += place + 1 + (0.0, 7.0, 1.0)[round_]
        self.calls += 1
        return self.now


def scripted_curve(rank: int) -> tuple[tuple[float, ...], int]:
    clock = ScriptedClock()
    return measured_curve(InferenceModel(build(spec())), clock, repeats=3), clock.calls


def costs_of(rank: int, tp: int) -> DraftCosts:
    model = InferenceModel(build(spec(vocab_size=33), tp), spec().exit_layers)
    return DraftCosts.of(model, (1.0,) * (MAX_DRAFTS + 1))


@pytest.mark.dist
def test_ranks_with_fewer_rows_count_the_same_costs() -> None:
    """The second rank has one of 33 words: ranks that drafted differently would wait for each other for ever."""
    first, second = workers.run(2, costs_of, 2)
    assert first == second
    (alone,) = workers.run(1, costs_of, 1)
    assert first.heads < alone.heads


def test_the_curve_is_of_medians_after_a_warm_up() -> None:
    curve, calls = workers.run(1, scripted_curve)[0]
    assert calls == 3 * 2 * (MAX_DRAFTS + 1)
    assert curve == pytest.approx([(rows + 1) / 2 for rows in range(1, MAX_DRAFTS + 2)])


def run(adaptive: AdaptiveLength, tokens: int, drafts_accepted: int, confident: bool = True) -> tuple[float, list[int]]:
    """(cost over full depth's, lengths) of making tokens when the first `drafts_accepted` drafts of a round are right."""
    cost, made, lengths = 0.0, 0, []
    while made < tokens:
        limit = adaptive.choose()
        drafted = limit if confident else 0
        accepted = min(drafted, drafts_accepted)
        attempts = min(drafted + 1, limit)
        cost += attempts * adaptive.costs.heads + drafted * adaptive.costs.early + adaptive.costs.verification(drafted)
        if limit:
            adaptive.learn(limit, drafted, min(accepted + 1, drafted), accepted)
        made += accepted + 1
        lengths.append(limit)
    return cost / (made * FULL), lengths


@pytest.mark.parametrize("confident", [True, False])
def test_useless_drafts_are_given_up_and_rarely_tried_again(confident: bool) -> None:
    cost, lengths = run(AdaptiveLength(COSTS), 256, 0, confident)
    assert cost < 1.035
    assert max(lengths) == 1
    assert lengths[100:].count(1) >= 1, "nobody would notice that drafts have become good"


def test_good_drafts_grow_long() -> None:
    cost, lengths = run(AdaptiveLength(COSTS), 200, MAX_DRAFTS)
    assert lengths[-1] == MAX_DRAFTS
    assert lengths[:2] == [1, 1]
    assert cost < 0.65


def test_drafts_that_become_good_are_found() -> None:
    adaptive = AdaptiveLength(COSTS)
    run(adaptive, 200, 0)
    cost, lengths = run(adaptive, 400, MAX_DRAFTS)
    assert lengths[-1] >= 4
    assert cost < 0.9


def test_dear_rows_keep_drafts_away() -> None:
    """Where two rows cost 1.67 times one, a draft that is right half of the time does not pay."""
    dear = DraftCosts(2.0, 10.0, 20.0, (1.0, *(1.67,) * MAX_DRAFTS))
    assert max(range(4), key=lambda limit: tokens_per_cost(limit, 1.0, 0.4, dear)) == 0
    assert max(range(4), key=lambda limit: tokens_per_cost(limit, 1.0, 0.6, COSTS)) > 0
