"""The table of speed against quality says what a forward from scratch for every token says."""

from __future__ import annotations

from collections import Counter

import pytest

from eellm.config.schema import DecodingConfig, ExitPolicyConfig
from eellm.decoding.benchmark import speed_against_quality
from eellm.metrics.tables import TableRow
from eellm.model.spec import ModelSpec
from tests import workers
from tests.decoding import oracle
from tests.decoding.models import build, spec
from tests.decoding.test_decoder import weights

COUNT = 12
PROMPTS = [(5, 17, 3), (42, 8, 1, 30, 2), (60,)]
THRESHOLDS = [1.5, 0.5, 0.0]


def table(rank: int, spec_: ModelSpec) -> list[TableRow]:
    decoding = DecodingConfig(
        mode="catch_up",
        prompts=[],
        max_new_tokens=COUNT,
        max_batch=1,
        max_tokens=None,
        draft_length="auto",
        max_pending=3,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        stop=[],
        stop_at_eos=True,
    )
    policy = ExitPolicyConfig(
        kind="max_probability", threshold=0.8, layer=None, active=[1, 3], min_new_tokens=2, calibration=None
    )
    return speed_against_quality(build(spec_), PROMPTS, decoding, policy, THRESHOLDS, repeats=2)


def agreement(spec_: ModelSpec, parameters: dict, rule: oracle.Rule) -> float:
    """Follow full depth's text; the rule's pending tokens are counted along it."""
    same = 0
    for prompt in PROMPTS:
        text = [token.id for token in oracle.decode(spec_, parameters, prompt, COUNT, oracle.Rule("never"))]
        logits = oracle.head_logits(spec_, parameters, [*prompt, *text])
        pending = 0
        for number in range(1, COUNT):
            here = {name: all_[len(prompt) - 1 + number] for name, all_ in logits.items()}
            forced = number < rule.min_new_tokens or pending >= rule.max_pending
            head = "final" if forced else oracle.who_speaks(spec_, here, rule)
            pending = 0 if head == "final" else pending + 1
            same += int(here[head].argmax()) == text[number]
    return same / (len(PROMPTS) * (COUNT - 1))


def test_rows_against_the_plain_model() -> None:
    spec_ = spec()
    rows = workers.run(1, table, spec_)[0]
    assert [(row["decoding"], row["policy"], row["threshold"]) for row in rows] == [
        ("full", "never", None),
        *(("catch_up", "max_probability", threshold) for threshold in THRESHOLDS),
    ]
    assert rows[0]["speedup"] == rows[0]["agreement"] == 1.0
    assert rows[0]["mean_layers"] == 4.0
    agreements = []
    for row, threshold in zip(rows[1:], THRESHOLDS, strict=True):
        rule = oracle.Rule("max_probability", {1: threshold, 3: threshold}, min_new_tokens=2, max_pending=3)
        tokens = [token for prompt in PROMPTS for token in oracle.decode(spec_, weights(spec_), prompt, COUNT, rule)[1:]]
        heads = Counter(token.head for token in tokens)
        for head in spec_.heads:
            assert row[f"share_{head}"] == pytest.approx(heads[head] / len(tokens))
        layers = {"exit_01": 1, "exit_03": 3, "final": 4}
        assert row["mean_layers"] == pytest.approx(sum(layers[head] * count for head, count in heads.items()) / len(tokens))
        assert row["agreement"] == pytest.approx(agreement(spec_, weights(spec_), rule))
        assert row["tokens_per_second"] > 0
        assert row["speedup"] > 0
        assert row["accuracy"] is None
        agreements.append(row["agreement"])
    assert agreements[0] == 1.0 > agreements[1] > agreements[2]
