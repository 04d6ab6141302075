import math
import random
import statistics

import pandas as pd
import pytest

from eellm.analysis import pareto_front, spread, within_noise
from eellm.analysis.comparison import t_quantile
from eellm.errors import RunError


def runs(values, **columns):
    """One row a setting and seed."""
    rows = [
        {"weight": weight, "seed": seed, "loss": loss} for weight, losses in values.items() for seed, loss in enumerate(losses)
    ]
    return pd.DataFrame(rows).assign(**columns)


def test_spread_is_that_of_the_sample():
    losses = {0.1: [4.0, 4.1, 4.5], None: [3.0]}
    frame = spread(runs(losses), "weight", "loss")
    assert frame["mean"].tolist() == [statistics.mean(losses[0.1]), 3.0]
    assert frame["std"].tolist() == [pytest.approx(statistics.stdev(losses[0.1])), pytest.approx(math.nan, nan_ok=True)]
    assert frame["n"].tolist() == [3, 1]


def test_runs_without_the_value_do_not_count():
    assert spread(runs({1: [4.0, None]}), ["weight"], "loss")["n"].tolist() == [1]


@pytest.mark.parametrize(("degrees", "published"), [(1, 12.706), (3, 3.182), (10, 2.228), (20, 2.086), (30, 2.042), (120, 1.980)])
def test_intervals_are_as_wide_as_in_printed_tables(degrees, published):
    assert t_quantile(degrees) == pytest.approx(published, abs=3e-3)


def test_equal_seeds_are_compared():
    """Seeds differ by far more than the settings: only pairs show the difference, and only where both have run."""
    frame = runs({0.1: [4.0, 5.0, 6.0, 7.0], 0.5: [4.10, 5.11, 6.09]})
    row = within_noise(frame, "weight", "loss", baseline=0.1).iloc[0]
    assert (row["difference"], row["n"], row["within_noise"]) == (pytest.approx(0.1), 3, False)
    half = 4.3027 * 0.01 / math.sqrt(3)
    assert (row["low"], row["high"]) == (pytest.approx(0.1 - half), pytest.approx(0.1 + half))
    swapped = frame.assign(seed=[0, 1, 2, 3, 1, 2, 0])
    assert within_noise(swapped, "weight", "loss", baseline=0.1)["within_noise"].tolist() == [True]


def test_settings_are_compared_on_their_own_for_each_of_other_columns():
    late, early = (
        runs({1: [4.0, 5.0], 2: [4.5, 5.3]}, step=20, head="final"),
        runs({1: [6.0, 7.0], 2: [5.0, 6.2]}, step=10, head="final"),
    )
    table = within_noise(pd.concat([late, early]), "weight", "loss", baseline=1, each=["step", "head"])
    alone = pd.concat([within_noise(rows, "weight", "loss", baseline=1) for rows in (late, early)], ignore_index=True)
    assert table["step"].tolist() == [20, 10]
    assert list(table.columns[:2]) == ["step", "head"]
    pd.testing.assert_frame_equal(table.drop(columns=["step", "head"]), alone)


def test_one_seed_says_nothing():
    for frame in (runs({1: [4.0], 2: [9.0]}), runs({1: [4.0], 2: [9.0]}).drop(columns="seed")):
        row = within_noise(frame, "weight", "loss", baseline=1).iloc[0]
        assert (row["n"], row["within_noise"], math.isnan(row["low"])) == (1, True, True)


def test_a_missing_setting_is_one_too():
    frame = within_noise(runs({None: [4.0, 5.0], 0.5: [4.1, 5.2]}), "weight", "loss", baseline="null")
    assert frame[["weight", "difference"]].values.tolist() == [[0.5, pytest.approx(0.15)]]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(RunError, match="no run has weight=7"):
        within_noise(runs({1: [4.0]}), "weight", "loss", baseline=7)
    with pytest.raises(RunError, match="several runs have the same weight and seed"):
        within_noise(runs({1: [4.0, 5.0]}).assign(seed=1), "weight", "loss", baseline=1)


def beaten(row, rows):
    return any(
        other["speedup"] >= row["speedup"] and other["agreement"] >= row["agreement"]
        and (other["speedup"] > row["speedup"] or other["agreement"] > row["agreement"])
        for other in rows
    )  # fmt: skip


def test_the_front_is_what_no_other_row_beats():
    chance = random.Random(2)
    for _ in range(30):
        rows = [
            {"speedup": chance.randint(0, 9), "agreement": chance.randint(0, 9), "mode": chance.choice("ab")} for _ in range(30)
        ]
        frame = pd.DataFrame([*rows, {"speedup": 99, "agreement": None, "mode": "a"}])
        expected = [place for place, row in enumerate(rows) if not beaten(row, rows)]
        front = pareto_front(frame)
        assert sorted(front.index) == expected
        assert front["speedup"].is_monotonic_increasing
        falling = pareto_front(frame.assign(agreement=-frame["agreement"]), lower_is_better=True)
        assert sorted(falling.index) == expected
        by_mode = [p for p, row in enumerate(rows) if not beaten(row, [other for other in rows if other["mode"] == row["mode"]])]
        assert sorted(pareto_front(frame, by="mode").index) == by_mode
