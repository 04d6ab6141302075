"""An evaluation on every layout equals the same numbers computed token by token from the plain model's logits."""

from __future__ import annotations

import functools

import pandas as pd
import pytest

from eellm.evaluation.exits import Evaluation, EvaluationOptions
from eellm.metrics.names import describe
from eellm.model.spec import ExitSpec, ModelSpec
from tests import workers
from tests.engine.layouts import tiny_spec
from tests.evaluation import slowly
from tests.evaluation.layouts import Case, evaluated, global_batches, whole_parameters

# a chunk of 5 does not divide the tokens; thresholds where all, some and no tokens exit
options = EvaluationOptions(thresholds=(0.0, 0.25, 0.4, 0.55, 0.8, 1.5), calibration_bins=7, chunk=5)
heads = (
    ExitSpec(1, "mlp", temperature=1.7),
    ExitSpec(2, "embedding", temperature=2.5),
    ExitSpec(3, "block", tie_output=False),
    ExitSpec(4, "norm", tie_output=False, temperature=0.8),
)
# with 7 words right and agreeing predictions are frequent, and tensor-parallel ranks hold 4 and 3 of them
mixed = tiny_spec(vocab_size=7, padded_vocab_size=8, init_std=0.25, exits=heads)
untied = tiny_spec(vocab_size=3, padded_vocab_size=8, init_std=0.25, exits=heads, tie_embeddings=False)
eight = tiny_spec(
    vocab_size=7, padded_vocab_size=8, init_std=0.25, num_layers=8, exits=(ExitSpec(2), ExitSpec(6, "block"), ExitSpec(8))
)

CASES = {
    "single": Case(mixed, options=options),
    "dp2": Case(mixed, {"dp": 2}, options=options),
    "tp2": Case(mixed, {"tp": 2}, options=options),
    "tp2_rank_of_padding": Case(untied, {"tp": 2, "sequence_parallel": True}, options=options),
    "pp2": Case(mixed, {"pp": 2}, options=options),
    "pp2_boundary_start": Case(mixed, {"pp": 2}, boundary="start", options=options),
    "pp2_vp2": Case(mixed, {"pp": 2, "vp": 2}, options=options),
    "tp2_pp2": Case(eight, {"tp": 2, "pp": 2}, options=options),
    "pp2_dp2": Case(eight, {"pp": 2, "dp": 2}, options=options),
    "pp4": Case(eight, {"pp": 4}, options=options),
}


@functools.cache
def table_of(spec: ModelSpec) -> pd.DataFrame:
    (parameters,) = workers.run(1, whole_parameters, spec)
    return slowly.token_table(spec, parameters, global_batches(spec))


@functools.cache
def expected(spec: ModelSpec) -> Evaluation:
    table = table_of(spec)
    return Evaluation(
        tokens=table.token.nunique(),
        heads=slowly.heads(table, options.calibration_bins),
        trade_off=[slowly.trade_off_row(table, threshold) for threshold in options.thresholds],
        reliability=slowly.reliability_rows(table, options.calibration_bins),
    )


def assert_rows(actual: list[dict], wanted: list[dict]) -> None:
    assert len(actual) == len(wanted)
    for row, want in zip(actual, wanted, strict=True):
        assert list(row) == list(want)
        for name, value in want.items():
            assert row[name] == (pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value), name


@pytest.mark.parametrize("name", CASES)
def test_every_number_equals_the_oracle_on_every_rank(name: str) -> None:
    case = CASES[name]
    results = workers.run(case.parallel.world_size, evaluated, case)
    assert all(result == results[0] for result in results)
    wanted = expected(case.spec)
    assert results[0].tokens == wanted.tokens
    for rows in ("exits", "trade_off", "reliability"):
        assert_rows(getattr(results[0], rows), getattr(wanted, rows))


def test_the_data_tells_the_heads_and_thresholds_apart() -> None:
    """The comparison above would miss mixed-up heads, tokens or thresholds if their numbers were alike."""
    wanted = expected(mixed)
    for column in ("loss", "accuracy", "agreement", "calibration_error"):
        assert len({row[column] for row in wanted.exits}) == len(mixed.heads)
    assert len({row["mean_layers"] for row in wanted.trade_off}) == len(options.thresholds)
    assert any(all(row[f"share_{head}"] > 0.05 for head in mixed.heads) for row in wanted.trade_off)


def test_scalars_are_metrics_of_the_table_of_names() -> None:
    (result,) = workers.run(1, evaluated, CASES["single"])
    scalars = result.scalars()
    assert len(scalars) == 5 * len(mixed.heads)
    assert all(describe(name) for name in scalars)
    assert scalars["eval/agreement/exit_02"] == result.exits[1]["agreement"]
    assert scalars["eval/loss/final"] == result.exits[-1]["loss"]
