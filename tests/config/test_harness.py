"""What is wrong with an evaluation by lm-evaluation-harness is said with the rest of the config's mistakes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from eellm.config.compose import compose
from eellm.config.rules import harness
from eellm.errors import ConfigError

ASKED = ["task=evaluate", "evaluation=lm_eval"]


def problems(*overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        compose([*ASKED, *overrides])
    return {problem.path: problem.reason for problem in caught.value.problems}


def test_a_whole_request_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    config = compose([*ASKED, "evaluation.tasks=[mine]", f"evaluation.include_path={tmp_path}", "decoding.max_batch=4"])
    assert (config.evaluation.name, config.evaluation.tasks, config.decoding.max_batch) == ("lm_eval", ["mine"], 4)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    found = problems(
        *("evaluation.tasks=[]", f"evaluation.include_path={tmp_path}", "decoding.temperature=0.5", "evaluation.batches=3"),
        *("data.split=[0.5,0.5]", "evaluation.decodings=[pipeline]"),
    )
    assert "nothing to answer" in found["evaluation.tasks"]
    assert "no file ends in .yaml" in found["evaluation.include_path"]
    assert "generation_kwargs" in found["decoding.temperature"]
    assert "never reads it" in found["evaluation.batches"]
    assert "never reads it" in found["data.split"]
    assert "answered on one rank" in found["evaluation.decodings"]


def test_names_and_folders_are_checked() -> None:
    found = problems("evaluation.tasks=[boolq,boolq]", "evaluation.include_path=nowhere")
    assert "more than once" in found["evaluation.tasks"]
    assert "no such folder" in found["evaluation.include_path"]


def test_without_the_extra_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(harness, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(ConfigError, match=r"pip install 'eellm\[eval\]'"):
        compose([*ASKED, "evaluation.tasks=[boolq]"])
    assert compose(["task=evaluate"]).evaluation.name == "exits", "nothing else needs it"


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["task=evaluate", "evaluation.tasks=[boolq]"], "evaluation.tasks"),
        (["task=evaluate", "decoding.max_batch=2"], "decoding.max_batch"),
        (["evaluation=lm_eval", "evaluation.tasks=[boolq]"], "evaluation.name"),
    ],
)
def test_what_others_would_not_read_is_refused(overrides: list[str], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert path in {problem.path for problem in caught.value.problems}
