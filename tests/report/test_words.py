import math

import pytest

from eellm.report.run_record import RunRecord, load_run
from eellm.report.setup import read_setup
from eellm.report.words import exit_words, layout_words, outlook_words, run_words, setup_words, speed_words, title_words
from tests.metrics.example_config import example_config
from tests.report.example_run import write_example_run


def record_of(tmp_path, overrides=None, **parts):
    return RunRecord(tmp_path, config=example_config(overrides).model_dump(), **parts)


def head(name, layer, loss, agreement=0.5):
    return {"head": name, "layer": layer, "loss": loss, "agreement": agreement}


def decoded(threshold, speedup, agreement, mean_layers=4.0):
    numbers = {"speedup": speedup, "agreement": agreement, "mean_layers": mean_layers}
    return {"decoding": "catch_up", "policy": "max_probability", "threshold": threshold, **numbers}


@pytest.mark.parametrize(
    ("first", "said", "verdict"),
    [
        (4.1, "0.100 (2.5%) above", "nearly equal"),
        (5.0, "1.000 (25.0%) above", "do improve"),
        (3.9, "0.100 below", "not paid yet"),
    ],
)
def test_the_gap_between_heads_is_computed_and_judged(tmp_path, first, said, verdict):
    exits = [head("exit_02", 2, first, 0.832), head("exit_06", 6, 9.0), head("final", 8, 4.0, 1.0)]
    text = " ".join(exit_words(record_of(tmp_path, exits=exits)))
    assert "after layer 2 of 8" in text
    assert said in text
    assert f"{math.exp(first):.1f} against {math.exp(4.0):.1f}" in text
    assert "at 83% of the positions" in text
    assert verdict in text


def test_slow_early_exit_is_said_to_be_slow_and_why(tmp_path):
    record = record_of(tmp_path, speed_quality=[decoded(0.4, 0.81, 0.9), decoded(0.8, 0.93, 0.99)])
    text = " ".join(speed_words(record, read_setup(record)))
    assert "does not pay" in text
    assert "(0.8) runs at 0.93 times" in text
    layer = 4 * 128 * 128 + 3 * 128 * 384
    assert f"its 3 exits is to read as many weights as {3 * 2048 * 128 / layer:.1f} of its 8 layers hold" in text
    one = record_of(tmp_path, {"exit_policy.active": [4]}, speed_quality=record.speed_quality)
    assert f"its 1 exit is to read as many weights as {2048 * 128 / layer:.1f} of" in " ".join(speed_words(one, read_setup(one)))


def test_thresholds_out_of_reach_are_said_to_be(tmp_path):
    rows = [decoded(0.4, 0.9, 1.0, 8.0) | {"share_final": share} for share in (0.999, 1.0)]
    assert "Less than 1% of the tokens left early" in " ".join(speed_words(record_of(tmp_path, speed_quality=rows), None))
    rows.append(decoded(0.2, 0.9, 1.0, 7.0) | {"share_final": 0.9})
    assert "left early" not in " ".join(speed_words(record_of(tmp_path, speed_quality=rows), None))


def test_speed_that_costs_the_text_is_not_called_a_gain(tmp_path):
    record = record_of(tmp_path, speed_quality=[decoded(0.2, 1.5, 0.6), decoded(0.9, 1.0, 0.99)])
    text = " ".join(speed_words(record, None))
    assert "At threshold 0.2 decoding is 1.50 times as fast" in text
    assert "60% of the tokens" in text
    assert "No threshold that is faster than full depth keeps 95%" in text


def test_the_best_faithful_threshold_is_named(tmp_path):
    record = record_of(tmp_path, speed_quality=[decoded(0.2, 1.5, 0.6), decoded(0.7, 1.2, 0.96), decoded(0.9, 1.1, 0.99)])
    assert "1.20 times (threshold 0.7): there early exit pays" in " ".join(speed_words(record, None))
    faithful = record_of(tmp_path, speed_quality=[decoded(0.7, 1.2, 0.96)])
    assert speed_words(faithful, None)[-1] == "Early exit pays here."


def test_a_wide_model_is_not_blamed_for_its_vocabulary(tmp_path):
    overrides = {"model.hidden_size": 4096, "model.num_attention_heads": 32}
    record = record_of(tmp_path, overrides, speed_quality=[decoded(0.8, 0.93, 0.99)])
    assert len(speed_words(record, read_setup(record))) == 1


def test_the_outlook_counts_tokens_per_parameter(tmp_path):
    record = record_of(tmp_path, rows=[{"step": 400, "time": 1.0, "train/loss/final": 4.0}])
    setup = read_setup(record)
    tokens = 400 * 16 * 128
    assert f"{tokens:,} tokens, {tokens / setup.parameters:.2g} per parameter" in outlook_words(record, setup)[0]
    enough = math.ceil(20 * setup.parameters / (16 * 128))
    long = record_of(tmp_path, rows=[{"step": enough, "time": 1.0, "train/loss/final": 4.0}])
    assert outlook_words(long, setup) == []
    assert outlook_words(record_of(tmp_path), setup) == []


def test_parameters_are_those_of_the_matrices(tmp_path):
    layer = 4 * 128 * 128 + 3 * 128 * 384
    rows = math.ceil(2048 / example_config().model.vocab_multiple) * example_config().model.vocab_multiple
    tied = read_setup(record_of(tmp_path, {"model.tie_embeddings": True}))
    assert tied.parameters == 8 * layer + rows * 128
    own = {"model.tie_embeddings": False, "exits.tie_output": [True, False, False], "exits.head": ["norm", "mlp", "block"]}
    untied = read_setup(record_of(tmp_path, own))
    assert untied.parameters == 9 * layer + 3 * 128 * 384 + 4 * rows * 128


def test_the_model_and_its_layout_in_words(tmp_path):
    setup = read_setup(record_of(tmp_path))
    assert title_words(setup) == "8 layers, exits after 2, 4 and 6"
    assert setup_words(setup).startswith("Hidden size 128, 4 attention heads, 2,048 vocabulary entries, about ")
    assert layout_words(setup) == "2 processes: pipeline parallel 2."
    single = read_setup(record_of(tmp_path, {"parallel.pp": 1, "exits.layers": [4]}))
    assert layout_words(single) == "One process."
    assert title_words(single) == "8 layers, exit after 4"


def test_the_corpus_of_the_run_gives_the_vocabulary(tmp_path):
    (tmp_path / "corpus.json").write_text('{"vocab_size": 3}')
    assert read_setup(record_of(tmp_path)).spec.vocab_size == 3


def test_how_long_the_run_was(tmp_path):
    record = load_run(write_example_run(tmp_path / "run"))
    assert run_words(record, read_setup(record)) == "400 steps on 819,200 tokens, 3 min 53 s"
