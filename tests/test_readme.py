"""The README's commands: all compose and validate, the cheapest are run; its tables name what exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eellm.config.compose import compose
from eellm.rundir import RunDirectory
from tests.conf_files import RUN, first_of_each_sweep, option_files, overrides_of
from tests.plan.profiles import profile_in

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
STUDIES = [file.path.stem for file in option_files() if file.group == "study"]
COMMANDS = [line[line.index("run.py") :] for line in LINES if "run.py" in line]

TINY = ["model.num_layers=2", "model.hidden_size=32", "exits.layers=[1]", "data.sequence_length=32", "tokenizer.vocab_size=300"]
TINY += ["tokenizer.train_megabytes=0.1", "trainer=smoke", "trainer.progress=lines", "device=cpu"]


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 32}
LLAMA |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA |= {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes_and_validates(command: str, saved_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = [f"{prefix}.{suffix}" for prefix in ("corpus", "code", "prose") for suffix in ("bin", "idx")]
    for name in ("README.md", "corpus.jsonl", "chats.jsonl", "prose.txt", "tokenizer.json", *prefixes):
        (tmp_path / name).write_text("{}")
    (tmp_path / "program.csv").write_text("F0,F1,B0,F2,B1,F3,B2,B3\nF0,B0,F1,B1,F2,B2,F3,B3\n")
    for study in STUDIES:  # the folders that sweeps write
        (tmp_path / "multirun" / study).mkdir(parents=True)
    (tmp_path / "llama_folder").mkdir()
    (tmp_path / "llama_folder" / "config.json").write_text(json.dumps(LLAMA))
    profile_in(saved_run)
    monkeypatch.chdir(tmp_path)
    overrides = overrides_of(command.replace("run.py", RUN, 1).replace("$RUN", str(saved_run)))
    compose(first_of_each_sweep([override for override in overrides if "=" in override]))


def test_the_groups_and_options_are_those_of_conf() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|[^|]*\|$", README, re.MULTILINE)
    listed = {group: {name.strip() for name in options.split(",")} for group, options in rows}
    there: dict[str, set[str]] = {}
    for file in option_files():
        if file.group and not file.group.startswith("hydra"):
            there.setdefault(file.group, set()).add(file.name.rpartition("/")[2])
    for group, common in (("parallel", "published_"), ("experiment", "eetuning_llama2_")):
        there[group] = {name for name in there[group] if not name.startswith(common)} | {f"{common}..."}
    assert {group: listed.get(group) for group in there} == there


def test_the_places_exist() -> None:
    table = README[README.index("## Where things are") : README.index("**How an exit")]
    for place in re.findall(r"`((?:eellm|conf|run|experiments|notebooks|tests)[\w./]*)`", table):
        assert (ROOT / place).exists(), place


def run_py(*arguments: str, cwd: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments], cwd=cwd, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_cheapest_commands_run(tmp_path: Path) -> None:
    """Train on a text, continue, evaluate and generate, as the README says, at a size that takes seconds."""
    (tmp_path / "README.md").write_text(README * 4, encoding="utf-8")
    run_py("task=train", "data=text", "data.path=README.md", *TINY, cwd=tmp_path)
    (directory,) = (tmp_path / "outputs" / "train" / "default").iterdir()
    run = RunDirectory(directory)
    assert run.status()["state"] == "done"
    assert [step.name for step in run.steps()] == ["step_0000002"]
    run_py("task=train", f"resume={directory}", "trainer.max_steps=3", cwd=tmp_path)
    assert run.steps()[-1].name == "step_0000003"
    run_py("task=evaluate", f"checkpoint={directory}", "evaluation.batches=1", "decoding.max_new_tokens=3", cwd=tmp_path)
    (evaluated,) = (tmp_path / "outputs" / "evaluate" / "default").iterdir()
    assert (evaluated / "exits.csv").read_text().startswith("head,layer,loss")
    run_py("task=generate", f"checkpoint={directory}", "exit_policy.threshold=0.8", "decoding.max_new_tokens=3", cwd=tmp_path)
    (generated,) = (tmp_path / "outputs" / "generate" / "default").iterdir()
    assert len((generated / "generations.jsonl").read_text().splitlines()) == 3
