"""The length of drafts: expected tokens and costs against a simulation, and what the choice costs where drafts fail."""

from __future__ import annotations

import itertools

import pytest

from eellm.decoding.draft_length import MAX_DRAFTS, AdaptiveLength, Draft, DraftCosts, measured_curve, tokens_per_cost
from eellm.decoding.model.segments import InferenceModel
from tests import workers
from tests.decoding.models import build, spec

DEEPEST = Draft(2.0, 10.0)
COSTS = DraftCosts({4: DEEPEST}, full=30.0)


def expectation(limit: int, drafts: float, accepts: float, costs: DraftCosts, draft: Draft) -> float:
    """Tokens over cost by going through all outcomes of a round."""
    tokens = cost = 0.0
    for made in range(limit + 1):
        likely = drafts**made * (1.0 if made == limit else 1 - drafts)
        in_vain = costs.exits[4].heads if made < limit else 0.0
        rows = draft.early + (costs.full - draft.early) * costs.curve[made]
        cost += likely * (made * sum(draft) + in_vain + rows)
        for outcomes in itertools.product([True, False], repeat=made):
            kept = len(list(itertools.takewhile(bool, outcomes)))
            chance = accepts ** sum(outcomes) * (1 - accepts) ** (made - sum(outcomes))
            tokens += likely * chance * (kept + 1)
    return tokens / cost


@pytest.mark.parametrize("limit", [0, 1, 3, 5])
@pytest.mark.parametrize(("drafts", "accepts"), [(1.0, 0.5), (0.7, 0.9), (0.2, 0.0), (0.0, 0.3)])
@pytest.mark.parametrize("draft", [DEEPEST, Draft(0.5, 3.0)])
def test_a_rounds_yield(limit: int, drafts: float, accepts: float, draft: Draft) -> None:
    costs = DraftCosts({1: Draft(0.5, 3.0), 4: DEEPEST}, 30.0, tuple(1 + 0.1 * rows for rows in range(MAX_DRAFTS + 1)))
    wanted = expectation(limit, drafts, accepts, costs, draft)
    assert tokens_per_cost(limit, drafts, accepts, costs, draft) == pytest.approx(wanted)


class ScriptedClock:
    """Nothing is timed while the first round warms up; then rows pass in rows + 3, rows + 7 and rows + 1."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, -MAX_DRAFTS - 1

    def __call__(self) -> float:
        round_, place = divmod(self.calls // 2, MAX_DRAFTS + 1)
        if self.calls > 0 and self.calls % 2:  # the end of a pass
            self.now += place + 1 + (3.0, 7.0, 1.0)[round_]
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
    assert list(first.exits) == list(alone.exits)
    assert first.deepest.heads < alone.deepest.heads


def test_the_curve_is_of_the_shortest_times_after_a_warm_up() -> None:
    curve, calls = workers.run(1, scripted_curve)[0]
    assert calls == 3 * 2 * (MAX_DRAFTS + 1)
    assert curve == pytest.approx([(rows + 1) / 2 for rows in range(1, MAX_DRAFTS + 2)])


def run(
    adaptive: AdaptiveLength, tokens: int, drafts_accepted: int, confident: bool = True, layer: int = 4
) -> tuple[float, list[int]]:
    """(cost over full depth's, lengths) of making tokens when the first `drafts_accepted` drafts of a round are right, all of
    which come from the exit behind a layer."""
    cost, made, lengths, costs = 0.0, 0, [], adaptive.costs
    draft = costs.exits[layer]
    while made < tokens:
        limit = adaptive.choose()
        drafted = limit if confident else 0
        accepted = min(drafted, drafts_accepted)
        in_vain = costs.deepest.heads if drafted < limit else 0.0
        cost += drafted * sum(draft) + in_vain + costs.verification(drafted, draft.early)
        if limit:
            adaptive.learn(limit, [layer] * drafted, min(accepted + 1, drafted), accepted)
        made += accepted + 1
        lengths.append(limit)
    return cost / (made * costs.full), lengths


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
    dear = DraftCosts(COSTS.exits, COSTS.full, (1.0, *(1.67,) * MAX_DRAFTS))
    assert max(range(4), key=lambda limit: tokens_per_cost(limit, 1.0, 0.4, dear, DEEPEST)) == 0
    assert max(range(4), key=lambda limit: tokens_per_cost(limit, 1.0, 0.6, COSTS, DEEPEST)) > 0


def test_drafts_of_the_first_exit_pay_where_those_of_the_last_do_not() -> None:
    costs = DraftCosts({3: Draft(1.0, 7.0), 9: Draft(3.0, 25.0)}, 30.0, tuple(1 + 0.2 * rows for rows in range(MAX_DRAFTS + 1)))
    cost, lengths = run(AdaptiveLength(costs), 256, 3, layer=3)
    assert cost < 0.8
    assert max(lengths) >= 3
    cost, lengths = run(AdaptiveLength(costs), 256, 1, layer=9)
    assert cost < 1.035
    assert lengths.count(0) > 200
