import pytest

from eellm.metrics import names


def test_formatters_write_the_agreed_keys():
    assert names.train_loss("exit_06") == "train/loss/exit_06"
    assert names.train_weight("final") == "train/weight/final"
    assert names.val_loss("final") == "val/loss/final"
    assert names.memory_gb(3) == "train/memory_gb/stage_3"
    assert names.evaluation("agreement", "exit_04") == "eval/agreement/exit_04"
    assert names.harness("boolq", "acc", "none") == "lm_eval/boolq/acc"
    assert names.harness("gsm8k", "exact_match", "strict-match") == "lm_eval/gsm8k/exact_match/strict-match"


@pytest.mark.parametrize("metric", names.METRICS, ids=lambda metric: metric.pattern)
def test_every_pattern_is_found_by_its_keys_and_by_no_other(metric):
    named = (
        {"head": "exit_12", "stage": 11, "figure": "time/ratio", "score": "boolq/acc", "schedule": "gpipe"},
        {"head": "final", "stage": 0, "figure": "memory/added", "score": "gsm8k/exact_match/strict", "schedule": "one_f_one_b"},
    )
    for key in (metric.pattern.format(**values) for values in named):
        assert [found for found in names.METRICS if found.matches(key)] == [metric]
        assert names.describe(key) is metric


@pytest.mark.parametrize("key", ["train/loss/exit_6", "train/loss", "train/memory_gb/stage_", "val/loss/total", "x"])
def test_a_key_outside_the_table_is_refused(key):
    with pytest.raises(KeyError, match=r"names\.py"):
        names.describe(key)


def test_heads_come_in_order_of_depth():
    keys = ["val/loss/final", "val/loss/exit_10", "val/loss/exit_02", "val/loss/exit_100", "train/loss/exit_04", "step"]
    assert names.heads_in(names.VAL_LOSS, keys) == ["exit_02", "exit_10", "exit_100", "final"]
