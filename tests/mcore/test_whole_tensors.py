"""Checkpoints read and written tensor by tensor, against those that ranks write and read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, maybe_load_config, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

from eellm.config.compose import compose
from eellm.engine.chunks import ChunkOptions, Chunks, build_chunks
from eellm.errors import CheckpointError, WriteError
from eellm.mcore.checkpoint import load_stages, model_state
from eellm.mcore.checkpoint_writer import CheckpointWriter
from eellm.mcore.groups import init_groups
from eellm.mcore.whole_tensors import LazyTensor, read_checkpoint, write_checkpoint
from eellm.model.spec import tied_stages
from eellm.quiet import quiet_dependencies
from eellm.tasks.session import Plan
from tests import workers

MODEL = ["task=train", "model.num_layers=4", "model.hidden_size=32", "model.num_query_groups=2", "exits.layers=[1,3]"]
MODEL += ["exits.head=[mlp,block]", "exits.tie_output=[false,true]", "model.linear_bias=true"]
VOCABULARY = 300


def stages(overrides: list[str], *seeds: int) -> list[Chunks]:
    """One model for every seed."""
    quiet_dependencies()
    plan = Plan.of(compose([*MODEL, *overrides]), VOCABULARY)
    groups = init_groups(plan.layout, torch.device("cpu"), tied_stages(plan.spec, plan.stages))
    return [build_chunks(plan.spec, plan.stages, groups, ChunkOptions("fp32", seed)) for seed in seeds]


def save(rank: int, overrides: list[str], seed: int, target: str) -> None:
    CheckpointWriter().save(Path(target), model_state(stages(overrides, seed)[0].stages))


def unlike(rank: int, overrides: list[str], seed: int, source: str) -> list[str]:
    """Names of the parameters that a checkpoint sets to something else than `seed` does: initial values know no layout."""
    expected, loaded = stages(overrides, seed, seed + 1)
    load_stages(Path(source), loaded.stages)
    pairs = zip(loaded.stages, expected.stages, strict=True)
    both = [pair for one, other in pairs for pair in zip(one.named_parameters(), other.named_parameters(), strict=True)]
    assert both
    return [name for (name, parameter), (_, wanted) in both if not torch.equal(parameter, wanted)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    workers.run(2, save, ["parallel=tp2"], 1, str(tmp_path / "step_0000001"))
    return tmp_path / "step_0000001"


def test_the_form_is_named_as_megatron_core_names_it(tmp_path: Path) -> None:
    """Which is not imported where a checkpoint is written without ranks. Later releases write less, and pass over the rest."""
    (tmp_path / "theirs").mkdir()
    save_config(CheckpointingConfig("torch_dist", 1), str(tmp_path / "theirs"))
    write_checkpoint(tmp_path / "ours", {"weight": LazyTensor.of(torch.ones(2))})
    ours, theirs = (json.loads((tmp_path / whose / CONFIG_FNAME).read_text()) for whose in ("ours", "theirs"))
    assert theirs.items() <= ours.items()
    assert maybe_load_config(str(tmp_path / "ours")) == maybe_load_config(str(tmp_path / "theirs"))
    assert (tmp_path / "ours" / COMMON_STATE_FNAME).is_file()


def test_converting_does_not_import_megatron_core() -> None:
    said = "import sys, eellm.tasks.convert; print([name for name in sys.modules if name.partition('.')[0] == 'megatron'])"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.dist
def test_every_layout_loads_what_one_process_copied(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "step_0000001"
    write_checkpoint(copy, read_checkpoint(saved))
    for world, layout in ((1, "single"), (2, "tp2"), (2, "pp2_vp2"), (4, "tp2_pp2")):
        assert workers.run(world, unlike, [f"parallel={layout}"], 1, str(copy)) == [[]] * world, layout


@pytest.mark.dist
def test_a_copy_has_the_same_tensors(saved: Path, tmp_path: Path) -> None:
    before = read_checkpoint(saved)
    write_checkpoint(tmp_path / "copy", before)
    after = read_checkpoint(tmp_path / "copy")
    assert set(after) == set(before)
    assert before["layers.4.mlp.linear_fc1.weight"].shape[1] == 32
    assert all(torch.equal(after[name].read(), tensor.read()) for name, tensor in before.items())


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def tensor(number: int) -> LazyTensor:
        def read() -> torch.Tensor:
            alive.append(number)
            assert written() >= len(alive) - 2, "read ahead of what is written"
            return torch.full((1_000_000,), float(number))

        return LazyTensor((1_000_000,), torch.float32, read)

    def written() -> int:
        """Tensors of 4 MB on disk, as far as the file is flushed."""
        files = (tmp_path / "step_0000001.partial").glob("*.distcp")
        return sum(file.stat().st_size for file in files) // 4_000_000

    write_checkpoint(tmp_path / "step_0000001", {f"layer_{number}": tensor(number) for number in range(8)})
    assert sorted(alive) == list(range(8))
    assert read_checkpoint(tmp_path / "step_0000001")["layer_5"].read().unique().tolist() == [5.0]


def test_what_goes_wrong_while_reading_leaves_nothing(tmp_path: Path) -> None:
    def read() -> torch.Tensor:
        raise CheckpointError("the shard is cut short.")

    good, bad = LazyTensor.of(torch.zeros(3)), LazyTensor((2,), torch.float32, read)
    with pytest.raises(CheckpointError, match="cut short"):
        write_checkpoint(tmp_path / "step_0000001", {"good": good, "bad": bad})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_another_shape_than_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w was read as torch.float32 \[3\], announced as torch.float32 \[2\]"):
        write_checkpoint(tmp_path / "step_0000001", {"w": LazyTensor((2,), torch.float32, lambda: torch.zeros(3))})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError):
        write_checkpoint(tmp_path / "file" / "step_0000001", {"w": LazyTensor.of(torch.zeros(3))})


def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step_0000001", {"w": LazyTensor.of(torch.zeros(3))})
    (file,) = (tmp_path / "step_0000001").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=file.name):
        read_checkpoint(tmp_path / "step_0000001")
