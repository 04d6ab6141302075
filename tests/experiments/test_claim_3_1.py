"""claim_3_1.csv is a calculation: it is made again here, so that it follows the planner."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from eellm.config.compose import compose
from eellm.plan.outcome import plan

CSV = Path(__file__).resolve().parents[2] / "experiments" / "claim_3_1" / "claim_3_1.csv"


@pytest.mark.parametrize(
    ("layers", "head", "after"), [("[0.375]", "norm", "1"), ("[0.875]", "mlp", "3"), ("[0.34,0.42]", "norm", "1 1")]
)
def test_the_committed_rows_are_what_the_planner_says(layers: str, head: str, after: str) -> None:
    table = pd.read_csv(CSV)
    (row,) = table[(table["after"] == after) & (table["exits.head"] == head)].to_dict("records")
    for column, microbatches in (("few", 8), ("many", 64)):
        study = ["study=claim_3_1", f"exits.layers={layers}", f"exits.head={head}", f"data.global_batch_size={microbatches}"]
        config = compose(study)
        outcome = plan(config, config.tokenizer.vocab_size or 0)
        (iteration,) = outcome.iterations
        assert row[f"added_ms_{column}"] == pytest.approx(1e3 * (iteration.time - iteration.bare), abs=6e-5)
        assert row[f"added_share_{column}"] == pytest.approx(iteration.exits_cost, abs=6e-5)
        *others, last = [stage["forward"] + stage["backward"] for stage in outcome.json()["stages"]]
        assert row["load"] == pytest.approx(max(others) / last, abs=6e-5)
