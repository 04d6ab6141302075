"""Round trips, fingerprints, and what a saved run brings along."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from eellm.config.compose import compose, from_yaml, to_yaml
from eellm.config.fingerprint import weights_fingerprint
from eellm.errors import CheckpointError, ConfigError


def test_python_run_py_alone_is_the_quickstart() -> None:
    config = compose()
    assert config.task.name == "quickstart"
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (8, 128, 4)
    assert config.exits.layers == [2, 4, 6]
    assert config.study is None


@pytest.mark.parametrize("overrides", [[], ["experiment=eellm_30b"], ["exits.layers=[0.25,0.5]", "exits.head=[norm,mlp]"]])
def test_yaml_round_trip(overrides: list[str]) -> None:
    config = compose(overrides)
    again = from_yaml(to_yaml(config))
    assert again == config
    assert [type(layer) for layer in again.exits.layers] == [type(layer) for layer in config.exits.layers]


def test_the_config_is_read_only() -> None:
    with pytest.raises(Exception, match="frozen"):
        compose().optimizer.lr = 1.0


@pytest.mark.parametrize(
    "override",
    ["seed=2", "model.num_layers=9", "exits.head=mlp", "loss_weights.values=0.1", "data.sequence_length=64", "optimizer.lr=0.1"]
    + [
        "tokenizer.vocab_size=300",
        "lr_schedule.kind=linear",
        "precision=bf16",
        "data.global_batch_size=32",
        "trainer.max_steps=9",
    ]
    + ["debug=overfit"],
)
def test_the_fingerprint_follows_what_is_trained(override: str) -> None:
    assert weights_fingerprint(compose(["task=train", override])) != weights_fingerprint(compose(["task=train"]))


@pytest.mark.parametrize(
    "override",
    ["name=other", "parallel=pp2", "data.micro_batch_size=4", "optimizer=adam_distributed", "logger=csv", "trainer.val_every=7"]
    + ["exits.boundary=start", "device=cpu", "data.cache_dir=elsewhere", "resume=auto"],
)
def test_the_fingerprint_ignores_how_it_is_run(override: str) -> None:
    assert weights_fingerprint(compose(["task=train", override])) == weights_fingerprint(compose(["task=train"]))


def test_decay_steps_decide_not_the_length_of_the_run() -> None:
    ends = ["task=train", "lr_schedule.decay_steps=400"]
    assert weights_fingerprint(compose([*ends, "trainer.max_steps=100"])) == weights_fingerprint(compose(ends))


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step_0000002"])
def test_a_checkpoint_brings_its_model_along(saved_run: Path, where: str) -> None:
    config = compose(["task=evaluate", f"checkpoint={saved_run / where}"])
    assert config.model.num_layers == 4
    assert config.exits.layers == [1, 3]
    assert config.tokenizer.vocab_size == 512
    assert config.model.max_positions == 64
    assert config.data.sequence_length == 64


def test_the_corpus_is_the_checkpoints_unless_another_is_asked_for(saved_run: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("text")
    asked = ["data=text", f"data.path={tmp_path / 'book.txt'}"]
    config = compose(["task=evaluate", f"checkpoint={saved_run}", *asked])
    assert (config.data.source, config.data.sequence_length) == ("text", compose(asked).data.sequence_length)
    config = compose(["task=evaluate", f"checkpoint={saved_run}", "data.micro_batch_size=2"])
    assert (config.data.sequence_length, config.data.micro_batch_size) == (64, 2)


def test_an_unusable_checkpoint_says_what_was_found(saved_run: Path, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "nowhere", "no such directory"), (tmp_path, "found outputs")):
        with pytest.raises(CheckpointError, match=words):
            compose(["task=evaluate", f"checkpoint={path}"])
    shutil.rmtree(saved_run / "checkpoints" / "step_0000002")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        compose(["task=generate", f"checkpoint={saved_run}"])
    (saved_run / "config.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match="it has no model"):
        compose(["task=train", f"resume={saved_run}"])


def test_a_resumed_run_keeps_its_config_but_for_the_overrides(saved_run: Path) -> None:
    config = compose(["task=train", f"resume={saved_run}", "trainer.max_steps=77", "parallel=pp2", "optimizer.lr=0.5"])
    assert (config.model.num_layers, config.exits.layers, config.data.sequence_length) == (4, [1, 3], 64)
    assert (config.trainer.max_steps, config.parallel.pp, config.optimizer.lr) == (77, 2, 0.5)
    assert config.resume == str(saved_run)


YOUNGER = ("tuning", "convert", "plan", "device_profile", "serve", "schedule", "study")


def without(run: Path, *groups: str) -> None:
    """The run's config.yaml as it was before there were these groups."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({key: value for key, value in values.items() if key not in groups}))


def test_a_run_from_before_a_group_existed_goes_on_with_its_defaults(saved_run: Path) -> None:
    whole = compose(["task=train", f"resume={saved_run}", "trainer.max_steps=77"])
    without(saved_run, *YOUNGER)
    assert compose(["task=train", f"resume={saved_run}", "trainer.max_steps=77"]) == whole
    given = compose(["task=train", f"resume={saved_run}", "schedule=gpipe", "parallel=pp2"])
    assert (given.schedule.name, given.parallel.pp) == ("gpipe", 2)


@pytest.mark.parametrize("task", ["evaluate", "train", "tune", "generate"])
def test_a_checkpoint_from_before_a_group_existed_is_read(task: str, saved_run: Path) -> None:
    whole = compose([f"task={task}", f"checkpoint={saved_run}"])
    without(saved_run, *YOUNGER, "optimizer", "precision", "trainer")
    assert compose([f"task={task}", f"checkpoint={saved_run}"]) == whole


def test_what_decides_how_a_run_goes_on_is_not_made_up(saved_run: Path) -> None:
    without(saved_run, *YOUNGER, "optimizer", "seed")
    with pytest.raises(CheckpointError, match=r"config\.yaml is not a run's config: it has no seed, optimizer\."):
        compose(["task=train", f"resume={saved_run}"])


def test_a_tuned_run_needs_to_say_what_it_tuned(saved_run: Path) -> None:
    (saved_run / "config.yaml").write_text(to_yaml(compose(["task=tune", f"checkpoint={saved_run}"])))
    assert compose(["task=tune", f"resume={saved_run}"]).tuning.layers == [1, 3]
    without(saved_run, "tuning", "plan")
    with pytest.raises(CheckpointError, match="it has no tuning"):
        compose(["task=tune", f"resume={saved_run}"])


def test_a_config_file_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr_"):
        from_yaml(to_yaml(compose()).replace("  lr:", "  lr_:"))


def test_a_warm_start_takes_model_and_tokenizer_and_unless_asked_the_exits(saved_run: Path) -> None:
    warm = ["task=train", f"checkpoint={saved_run}"]
    kept = compose(warm)
    assert (kept.model.num_layers, kept.exits.layers, kept.tokenizer.vocab_size) == (4, [1, 3], 512)
    assert (kept.model.max_positions, kept.data.sequence_length) == (64, compose().data.sequence_length)
    assert kept.checkpoint == str(saved_run)
    assert compose([*warm, "exits.layers=[2]"]).exits.layers == [2]
    assert compose([*warm, "exits=none"]).exits.layers == []
    assert compose([*warm, "exits.init=copy"]).exits.layers == [1, 3]
    assert compose([*warm, "experiment=pp2_laptop", "exits.head=mlp", "exits.layers=[2,3]"]).exits.head == "mlp"
    # an experiment that sets exits asks for them, too
    with pytest.raises(ConfigError, match=r"exits\.layers=\[2,6\].*"):
        compose([*warm, "experiment=pp2_laptop"])


def test_a_resumed_warm_start_no_longer_reads_its_source(saved_run: Path, tmp_path: Path) -> None:
    config = compose(["task=train", f"checkpoint={saved_run}"])
    again = saved_run.with_name("warm")
    shutil.copytree(saved_run, again)
    (again / "config.yaml").write_text(to_yaml(config))
    shutil.rmtree(saved_run)
    resumed = compose(["task=train", f"resume={again}", "trainer.max_steps=9"])
    assert (resumed.checkpoint, resumed.resume, resumed.trainer.max_steps) == (str(saved_run), str(again), 9)
    assert weights_fingerprint(compose(["task=train", f"resume={again}"])) == weights_fingerprint(config)
    assert weights_fingerprint(config) != weights_fingerprint(config.model_copy(update={"checkpoint": None}))


def test_changing_exits_on_resume_names_the_warm_start(saved_run: Path) -> None:
    with pytest.raises(ConfigError, match=rf"task=train checkpoint={saved_run} exits.layers=\[1\]"):
        compose(["task=train", f"resume={saved_run}", "exits.layers=[1]"])
