"""The command line itself, as a process."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_py(*arguments: str, cwd: Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)


HYDRA_ALONE = f"""
import hydra
hydra.main(version_base="1.3", config_path={str(ROOT / "conf")!r}, config_name="config")(print)()
"""


def test_help_costs_little_more_than_hydra_alone(tmp_path: Path) -> None:
    """Processor time, beside that of an empty application on the same files: most of it is Hydra's, which looks for
    groups once for every folder, and grows with their number and with Hydra's plugins."""
    ratios = []
    for _ in range(3):
        begin = processor_seconds()
        subprocess.run([sys.executable, "-c", HYDRA_ALONE, "--help"], cwd=tmp_path, check=True, capture_output=True, timeout=100)
        alone = processor_seconds()
        result = run_py("--help", cwd=tmp_path)
        ratios.append((processor_seconds() - alone) / (alone - begin))
    assert min(ratios) < 1.3
    assert result.returncode == 0
    assert "exits: custom, every_eighth, none, quarter_half" in result.stdout
    assert "python run.py task=train" in result.stdout


def processor_seconds() -> float:
    """Used by child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    result = run_py("--help", cwd=tmp_path, flags=("-X", "importtime"))
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "hydra" in loaded
    assert loaded & {"torch", "megatron", "lightning", "wandb", "pandas", "matplotlib", "numpy", "tokenizers"} == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["exits.layers=[9]", "optimizer.learning_rate=1"], ["2 problems", "exits.layers", "did you mean optimizer.lr?"]),
        (["model=tinny"], ["model=tinny", "did you mean model=tiny?"]),
        (["modle=tiny"], ["modle=tiny", "did you mean model?"]),
        (["exits.layers=[2"], ["exits.layers=[2", "quote"]),
        (["model=3"], ["--help"]),
        (["task=evaluate", "checkpoint=nowhere"], ["nowhere: there is no such directory"]),
        (["hydra.run.dir=/dev/null/below"], ["cannot write /dev/null", "Not a directory"]),
    ],
)
def test_a_users_mistake_is_a_message(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    result = run_py(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert "HYDRA" not in result.stderr
    assert "++" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_goes_on_after_a_failure(tmp_path: Path) -> None:
    result = run_py("-m", "exits.layers=[9],[10]", cwd=tmp_path)
    assert result.returncode == 1
    assert "9 is not one of the layers" in result.stderr
    assert "10 is not one of the layers" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_experiment_of_ones_own(tmp_path: Path) -> None:
    experiment = tmp_path / "mine" / "experiment"
    experiment.mkdir(parents=True)
    (experiment / "good.yaml").write_text("# @package _global_\nseed: 7\n")
    (experiment / "typo.yaml").write_text("# @package _global_\nsede: 7\n")
    (experiment / "unread.yaml").write_text("# a comment in front\n# @package _global_\nseed: 7\n")
    assert "seed: 7" in run_py("--config-dir", "mine", "experiment=good", "--cfg", "job", cwd=tmp_path).stdout
    assert "did you mean seed?" in run_py("--config-dir", "mine", "experiment=typo", cwd=tmp_path).stderr
    assert "# @package _global_" in run_py("--config-dir", "mine", "experiment=unread", cwd=tmp_path).stderr
