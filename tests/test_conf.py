"""Every file under conf/: its command composes and validates, and what it says is what a run gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from eellm.config.compose import compose
from eellm.config.schema import Config
from eellm.model.spec import build_layout, build_spec, plan_stages
from eellm.tasks.session import Plan
from tests.conf_files import CONF, RUN, OptionFile, flattened, option_files, overrides_of
from tests.conftest import save_run
from tests.plan.profiles import profile_in

FILES = option_files()
STUDIES = [file.name.removeprefix("study/") for file in FILES if file.group == "study"]
OPTIONS = [file for file in FILES if file.group and not file.group.startswith("hydra")]

GROUPS = {
    *(
        "task",
        "model",
        "exits",
        "loss_weights",
        "parallel",
        "schedule",
        "data",
        "tokenizer",
        "optimizer",
        "lr_schedule",
        "precision",
    ),
    *(
        "trainer",
        "tuning",
        "evaluation",
        "calibration",
        "decoding",
        "exit_policy",
        "benchmark",
        "prepare",
        "serve",
        "convert",
        "plan",
        "report",
        "device_profile",
        "logger",
        "experiment",
        "study",
        "debug",
        "hydra",
        "hydra/help",
        "hydra/job_logging",
        "hydra/launcher",
        "hydra/sweeper",
    ),
}


SMOLLM2 = {
    "model.num_layers": 30,
    "model.hidden_size": 576,
    "model.num_attention_heads": 9,
    "model.num_query_groups": 3,
    "model.ffn_hidden_size": 1536,
    "model.vocab_size": 49152,
}
CONVERTED = {
    "llama2_13b": ("model=llama2_13b",),
    "llama2_70b": ("model=llama2_70b",),
    "smollm2": tuple(f"{key}={value}" for key, value in SMOLLM2.items()),
}
"""Models that experiments start from, by the folder that their commands name."""


def named(file: OptionFile) -> str:
    return file.name


def runnable(overrides: list[str], run: Path, files: Path) -> list[str]:
    """The overrides with paths that exist in place of those of the example."""
    (files / "corpus.jsonl").write_text('{"text": "one"}\n')
    for name in ("prose.txt", "chats.jsonl"):
        (files / name).write_text("One.\n")
    (files / "tokenizer.json").write_text("{}")
    for ending in (".bin", ".idx"):
        (files / f"corpus_text_document{ending}").touch()
    for name, model in CONVERTED.items():
        if any(f"outputs/convert/{name}/<time>" in override for override in overrides):
            run = save_run(files / name, "exits=none", *model)
            overrides = [override.replace(f"outputs/convert/{name}/<time>", str(run)) for override in overrides]
    names = {
        "outputs/train/default/<time>": str(run),
        **{f"=multirun/{study}": f"={run}" for study in STUDIES},
        "=README.md": f"={CONF.parent / 'conf' / 'config.yaml'}",
    }
    if any("outputs/benchmark/default/<time>" in override for override in overrides):
        names["device_profile.path=outputs/benchmark/default/<time>"] = profile_in(files)
    (files / "program.csv").write_text("F0,F1,B0,F2,B1,F3,B2,B3\nF0,B0,F1,B1,F2,B2,F3,B3\n")
    named_files = ("corpus.jsonl", "chats.jsonl", "prose.txt", "tokenizer.json", "corpus_text_document", "program.csv")
    names |= {f"={name}": f"={files / name}" for name in named_files}
    for name, path in names.items():
        overrides = [override.replace(name, path) for override in overrides]
    return overrides


def test_the_groups() -> None:
    assert {file.group for file in FILES if file.group} == GROUPS


@pytest.mark.parametrize("file", FILES, ids=named)
def test_a_file_begins_with_its_command(file: OptionFile) -> None:
    assert file.command.startswith(RUN)
    # anything before the package line disables it
    assert not any(line.startswith("# @package") for line in file.lines[1:])
    assert file.is_global == (file.group in ("experiment", "study"))
    if file in OPTIONS:
        group, option = file.name.split("/")
        default = {"task/quickstart"}
        assert f"{group}={option}" in overrides_of(file.command) or file.name in default


@pytest.mark.parametrize("file", OPTIONS, ids=named)
def test_the_command_validates_and_the_files_own_values_survive(file: OptionFile, saved_run: Path, tmp_path: Path) -> None:
    overrides = runnable(overrides_of(file.command), saved_run, tmp_path)
    if file.group not in ("experiment", "study"):
        # the option itself, without the values that its example sets
        typed = {override.partition("=")[0] for override in overrides}
        prefix = f"{file.group}."
    else:
        typed, prefix = set(), ""
    if "checkpoint" in file.own_values:  # of a model without exits: those that one has stand beside the file's
        overrides, typed = [*overrides, f"checkpoint={save_run(tmp_path / 'plain', 'exits=none')}"], {"checkpoint"}
    config = compose(overrides)
    got = config.flat()
    for key, value in flattened(file.own_values, prefix).items():
        if key not in typed:
            assert got[key] == value or str(value).startswith("${"), key


def test_the_primary_configs_own_values_survive() -> None:
    primary = next(file for file in FILES if file.name == "config")
    got = compose().flat()
    for key, value in flattened(primary.own_values).items():
        assert got[key] == value


def test_self_stands_before_the_experiment() -> None:
    lines = next(file for file in FILES if file.name == "config").lines
    names = [line.split("#")[0].strip(" -") for line in lines if line.startswith("  - ")]
    assert names.index("_self_") < names.index("experiment: null") < names.index("study: null")


def test_every_key_has_a_value_in_some_file() -> None:
    assert set(compose().model_dump()) == set(Config.model_fields)


@pytest.mark.parametrize(
    ("experiment", "stage_exits", "parameters"),
    [
        ("eellm_1_3b", [[], [6], [12], []], 1.3e9),
        ("eellm_7b", [[], [8], [16], []], 7e9),
        ("eellm_13b", [[], [10], [20], []], 13e9),
        ("eellm_30b", [[], [15], [30], []], 30e9),
    ],
)
def test_the_published_layouts(experiment: str, stage_exits: list[list[int]], parameters: float) -> None:
    """Exits of the published runs sit on stages 1 and 2 of 4; the sizes give the models their names."""
    config = compose([f"experiment={experiment}"])
    spec = build_spec(config, config.tokenizer.vocab_size or 0)
    stages = plan_stages(spec, build_layout(config), config.parallel.layers_per_stage, config.exits.boundary)
    assert [[exit_.layer for exit_ in stage.exits] for stage in stages] == stage_exits
    # without exits: 4 h^2 of attention and 3 h f of MLP a layer, and one or two embedding matrices
    hidden, embeddings = spec.hidden_size, 1 if spec.tie_embeddings else 2
    count = spec.num_layers * (4 * hidden**2 + 3 * hidden * spec.ffn_hidden_size) + embeddings * hidden * spec.vocab_size
    assert abs(count / parameters - 1) < 0.1


@pytest.mark.parametrize(
    ("experiment", "model", "layers", "exits"),
    [
        ("eetuning_llama2_13b_1_exit", "llama2_13b", [3, 3, 2, 2], [[], [], [], [10]]),
        ("eetuning_llama2_13b_8_exits", "llama2_13b", [10] * 4, [[5, 10], [15, 20], [25, 30], [35, 40]]),
        ("eetuning_llama2_70b_1_exit", "llama2_70b", [20], [[20]]),
        ("eetuning_llama2_70b_8_exits", "llama2_70b", [20] * 4, [[10, 20], [30, 40], [50, 60], [70, 80]]),
    ],
)
def test_the_published_tuning(experiment: str, model: str, layers: list[int], exits: list[list[int]], tmp_path: Path) -> None:
    """What is built of Llama-2: no layer above the deepest exit, and no final head."""
    run = save_run(tmp_path / model, "exits=none", f"model={model}")
    config = compose([f"experiment={experiment}", f"checkpoint={run}"])
    stages = Plan.of_tuning(config, 32000).stages
    assert [stage.num_layers for stage in stages] == layers
    assert [[exit_.layer for exit_ in stage.exits] for stage in stages] == exits
    assert not any(stage.has_final_head for stage in stages)


def test_output_directories() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra_compose("config", ["name=abc", "task=train"], return_hydra_config=True)
        study = hydra_compose("config", ["study=loss_weights"], return_hydra_config=True)
    hydra = composed.hydra
    hydra_run, sweep = hydra.run.dir, hydra.sweep.dir
    assert hydra_run.startswith("outputs/train/abc/20")
    assert (sweep, hydra.sweep.subdir) == ("multirun/abc", ".")  # a job's folder below it is named by its fingerprint
    assert study.hydra.sweep.dir == "multirun/loss_weights"
    assert hydra.output_subdir is None
    assert not hydra.job.chdir


def with_hydra(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", list(overrides), return_hydra_config=True)


def first_and_last_job(overrides: list[str]) -> list[list[str]]:
    """What the first and the last job of a study's sweep are given; a value typed for one of its parameters takes its place."""
    typed = {override.partition("=")[0] for override in overrides}
    params = with_hydra(*overrides).hydra.sweeper.params
    sweep = [f"{key}={values}" for key, values in params.items() if key not in typed]
    parsed = OverridesParser.create().parse_overrides([*overrides, *sweep])
    choices = [list(one.sweep_string_iterator()) if one.is_sweep_override() else [one.get_value_string()] for one in parsed]
    keys = [one.key_or_group for one in parsed]
    return [[f"{key}={values[end]}" for key, values in zip(keys, choices, strict=True)] for end in (0, -1)]


def cluster_command(study: str) -> str:
    text = (CONF.parent / "experiments" / study / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = [line for line in text.splitlines() if line.startswith(RUN) and "hydra/launcher=slurm" in line.split()]
    return command


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_grows_by_the_command_of_its_readme(study: str, tmp_path: Path) -> None:
    """Without edits, and with no value of its own that a run of that size would refuse."""
    overrides = overrides_of(cluster_command(study))
    if any(override.startswith("checkpoint=") for override in overrides):
        run = save_run(tmp_path / "large", "exits=none", "model=gpt_1_3b")
        overrides = [override.replace("outputs/train/default/<time>", str(run)) for override in overrides]
    assert f"study={study}" in overrides
    grown = with_hydra(*overrides)
    assert grown.hydra.launcher._target_.endswith("SlurmLauncher")
    assert grown.hydra.mode.name == "MULTIRUN"
    for job in first_and_last_job(overrides):
        config = compose([override for override in job if not override.startswith("hydra/")])
        assert config.model.num_layers >= 24, job


@pytest.mark.parametrize("study", STUDIES)
def test_a_studys_first_and_last_job_validate(study: str) -> None:
    for job in first_and_last_job([f"study={study}"]):
        assert compose(job).study is not None


def test_the_slurm_launcher() -> None:
    """What submitit's plugin is given: a warning before the end, as many requeues as it takes, one task that starts the ranks."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=8", "task=train", "resume=auto"]
        launcher = hydra_compose("config", overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_ == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    assert (launcher.tasks_per_node, launcher.nodes, launcher.gpus_per_node) == (1, 1, 8)
    assert (launcher.timeout_min, launcher.signal_delay_s, launcher.max_num_timeout) == (1440, 300, 100)
