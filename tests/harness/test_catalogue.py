"""Tasks that cannot be loaded are all named, with what to do about each."""

from __future__ import annotations

import zlib
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from eellm.config.compose import compose
from eellm.errors import ConfigError, Problem
from eellm.harness import catalogue
from eellm.harness.catalogue import load_catalogue
from tests.harness.local_tasks import GROUP, write_tasks

ASKED = ["task=evaluate", "evaluation=lm_eval"]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # the harness's own 14,000 tasks take long to look through
    monkeypatch.setattr(catalogue, "TaskManager", lambda **options: TaskManager(**{**options, "include_defaults": False}))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def problems(tasks: Path, *names: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(tasks, *names)
    return caught.value.problems


def load(tasks: Path, *names: str) -> catalogue.Catalogue:
    return load_catalogue(
        compose([*ASKED, f"evaluation.tasks=[{','.join(names)}]", f"evaluation.include_path={tasks}"]).evaluation
    )


def test_groups_keep_their_members(tasks: Path) -> None:
    found = load(tasks, GROUP, "py_text")
    assert [getattr(task, "name", None) or task.task_name for task in found.tasks] == [GROUP, "py_text"]
    assert found.members == {GROUP: ["py_choice", "py_next"]}


def test_every_task_that_cannot_be_loaded_is_named(tasks: Path) -> None:
    (tasks / "needs_package.py").write_text("import no_such_package\n")
    more = {
        "of_the_hub": "dataset_path: nobody/nothing",
        "without_file": "dataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere/missing.jsonl}}",
        "of_a_package": "dataset_path: json\nprocess_docs: !function needs_package.docs",
    }
    for name, data in more.items():
        rest = "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_target: text\nmetadata: {version: 1.0}\n"
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{data}\n{rest}")
    unknown, hub, file, package = problems(tasks, "py_chioce", "py_text", *more)
    assert {problem.path for problem in (unknown, hub, file, package)} == {"evaluation.tasks"}
    assert [problem.value for problem in (unknown, hub, file, package)] == ["py_chioce", *more]
    assert "did you mean py_choice" in unknown.fix
    assert "huggingface.co" in hub.fix
    assert "missing.jsonl" in file.reason
    assert package.fix == "pip install no_such_package"


class Hashes(LM):
    """Answers that depend on every letter of a request."""

    def loglikelihood(self, requests):
        return [(-float(zlib.crc32(repr(request.args).encode()) % 997) / 100, False) for request in requests]

    def loglikelihood_rolling(self, requests):
        return [answer for answer, _ in self.loglikelihood(requests)]

    def generate_until(self, requests):
        return [str(answer) for answer, _ in self.loglikelihood(requests)]


@pytest.mark.parametrize("shots", [None, 2])
def test_results_are_those_of_simple_evaluate_every_time(tasks: Path, monkeypatch: pytest.MonkeyPatch, shots: int | None) -> None:
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    found = load(tasks, GROUP, "py_text", "py_write")
    config = compose(
        [*ASKED, "evaluation.tasks=[x]", f"evaluation.num_fewshot={shots or 'null'}", "evaluation.limit=6"]
    ).evaluation
    results = [found.evaluate(Hashes(), config) for _ in range(2)]
    options = {"num_fewshot": shots, "limit": 6, "bootstrap_iters": config.bootstrap, "log_samples": False}
    wanted = evaluator.simple_evaluate(Hashes(), tasks=found.tasks, task_manager=found.manager, **options)
    for name in ("results", "n-shot", "n-samples", "higher_is_better", "versions"):
        assert results[0][name] == results[1][name] == wanted[name]
    assert results[0]["n-shot"]["py_choice"] == (shots or 0)


def test_a_task_that_is_named_twice_over_a_group(tasks: Path) -> None:
    (problem,) = problems(tasks, GROUP, "py_next")
    assert "py_next" in problem.reason
