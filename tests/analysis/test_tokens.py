import json

import pytest

from eellm.analysis import load_runs, token_table
from eellm.analysis.tokens import KINDS, kind_of
from tests.analysis.run_folders import write_run


@pytest.mark.parametrize(
    ("before", "text", "kind"),
    [
        ("", "def", "word"), ("x = ", "read", "word"), ("x", " read", "word"), ("read", "_config", "continuation"),
        ("config", "uration", "continuation"), ("x1", "2", "continuation"), ("x[", "12", "number"), ("1", "2", "number"),
        ("x ", " 3.5", "number"), ("x", "(", "symbol"), ("x", " ==", "symbol"), ("f()", "\n", "space"), ("\n", "    ", "space"),
        ("x", "", "partial"), ("na", "ïve", "continuation"), ("(", "'utf", "symbol"),
    ],
)  # fmt: skip
def test_kinds(before, text, kind):
    assert kind_of(text, before) == kind
    assert kind in KINDS


def test_a_row_a_token(tmp_path):
    spoken = [("im", "exit_02", 2), ("port", "final", 8), (" os", "exit_02", 2)]
    tokens = [
        {"text": text, "head": head, "exit_layer": layer, "confidence": 0.5, "logprob": -1.0} for text, head, layer in spoken
    ]
    run = write_run(tmp_path / "a")
    line = {"prompt": "\n", "text": "import os", "decoding": "catch_up", "tokens": tokens, "seconds": 1.0}
    lines = [{**line, "threshold": 0.5}, {**line, "threshold": [0.5, 0.8]}, {**line, "threshold": None, "decoding": "full"}]
    (run / "generations.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    frame = token_table(load_runs(tmp_path))
    assert frame["position"].tolist() == [0, 1, 2] * 3
    assert frame["kind"].tolist()[:3] == ["word", "continuation", "word"]
    assert frame["exit_layer"].tolist()[:3] == [2, 8, 2]
    assert frame["threshold"].unique().tolist() == ["0.5", "0.5 0.8", "full depth"]
    assert frame["generation"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
