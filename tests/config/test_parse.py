"""Unknown keys, wrong types and wrong ranges: what the error says."""

from __future__ import annotations

import pytest

from eellm.config.compose import compose
from eellm.config.parse import dotted
from eellm.errors import ConfigError, Problem


def the_problem(*overrides: str) -> Problem:
    with pytest.raises(ConfigError) as raised:
        compose(list(overrides))
    (problem,) = raised.value.problems
    return problem


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("model.num_layer=3", "model.num_layers"),
        ("optimizer.learning_rate=3", "optimizer.lr"),
        ("optimizer.tp=3", "parallel.tp"),
        ("tp=2", "parallel.tp"),
        ("max_steps=2", "trainer.max_steps"),
        ("sede=2", "seed"),
        ("modle=tiny", "model"),
        ("logger.wandb.projekt=x", "logger.wandb.project"),
    ],
)
def test_an_unknown_key_suggests_the_known_one(override: str, suggestion: str) -> None:
    problem = the_problem(override)
    assert problem.path == override.partition("=")[0]
    assert problem.reason == "unknown key"
    assert problem.fix == f"did you mean {suggestion}?"


def test_an_unknown_key_like_no_other_gets_the_list() -> None:
    keys = "name, engine, path, backward_forward_ratio, part_one, part_two"
    assert the_problem("schedule.zzz=1").fix == f"the keys of schedule are {keys}"


@pytest.mark.parametrize(
    ("override", "path", "reason"),
    [
        ("model.norm=rmsnrm", "model.norm", "must be one of rmsnorm, layernorm"),
        ("model.num_layers=many", "model.num_layers", "must be a whole number"),
        ("model.num_layers=2.5", "model.num_layers", "must be a whole number"),
        ("model.num_layers=0", "model.num_layers", "must be a number, at least 1"),
        ("optimizer.lr=0", "optimizer.lr", "must be a number greater than 0"),
        ("optimizer.beta1=1.5", "optimizer.beta1", "must be a number, at most 1"),
        ("parallel.sequence_parallel=perhaps", "parallel.sequence_parallel", "must be true or false"),
        ("exits.layers=4", "exits.layers", "must be a list [a,b,...]"),
        ("exits.layers=[2,x]", "exits.layers[1]", "must be a whole number or a number"),
        ("exits.head=nrm", "exits.head", "must be one of embedding, norm, mlp, block or a list [a,b,...]"),
        ("exits.head=[norm,nrm,mlp]", "exits.head", "must be one of embedding, norm, mlp, block"),
        ("seed.x=1", "seed", "must be a whole number"),
        ("name=a/b", "name", "must be letters, digits and any of . _ - (it names a folder)"),
        ("optimizer.lr=???", "optimizer.lr", "has no default"),
        ("~optimizer.lr", "optimizer.lr", "is missing"),
    ],
)
def test_a_wrong_value_says_what_is_right(override: str, path: str, reason: str) -> None:
    problem = the_problem(override)
    assert problem.path in (path, f"{path}[1]")
    assert problem.reason == reason


def test_the_closest_option_is_suggested() -> None:
    assert the_problem("model.norm=rmsnrm").fix.startswith("did you mean rmsnorm?")


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("model=tinny", "model", "did you mean model=tiny?"),
        ("experiment=eellm_7", "experiment", "did you mean experiment=eellm_7b?"),
        ("exits.layers=[2", "exits.layers", "quote"),
        ("model=3", "configuration", "--help"),
    ],
)
def test_what_hydra_refuses_is_explained(override: str, path: str, words: str) -> None:
    problem = the_problem(override)
    assert problem.path == path
    assert words in problem.fix


def test_values_of_a_file_without_its_package_line(tmp_path) -> None:
    from eellm.config.compose import validated

    values = compose().model_dump()
    with pytest.raises(ConfigError) as raised:
        validated({**values, "experiment": {"seed": 7}})
    (problem,) = raised.value.problems
    assert "# @package _global_" in problem.fix


def test_numbers_may_name_runs() -> None:
    assert compose(["name=7"]).name == "7"


def test_whole_floats_are_whole_numbers() -> None:
    assert compose(["trainer.max_steps=1e3"]).trainer.max_steps == 1000


def test_dotted() -> None:
    assert dotted(("exits", "layers", 1)) == "exits.layers[1]"
