"""task=tune: every layout tunes alike, an interrupted run becomes the same, and the source's other tensors keep their bytes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from eellm.config.compose import from_yaml
from eellm.data.batches import training_batches
from eellm.data.corpus import Corpus
from eellm.mcore.whole_tensors import read_checkpoint
from eellm.model.objective import HeadWeights
from eellm.rundir import RunDirectory
from eellm.tasks.session import Plan
from tests import workers
from tests.reference import Reference
from tests.tasks.tuning import TEXT, TUNING, parameters_built, run_task, source_run
from tests.train.fitting import MODULES

EXITS = ["exits.layers=[1,2]", "exits.head=[mlp,block]", "exits.tie_output=[true,false]"]
LAYOUTS = {
    "tp2_sequence_parallel": (2, ["parallel=tp2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel=pp2"]),
    "dp2_distributed": (2, ["parallel=dp2", "optimizer=adam_distributed", "optimizer.lr=1e-2"]),
}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    workers.run(1, source_run, str(folder / "source"))
    return folder / "source"


def tuned_on(world: int, overrides: list[str], source: Path, target: Path) -> list[dict[str, float]]:
    return workers.run(world, run_task, [*TUNING, f"checkpoint={source}", *overrides], str(target))


@pytest.fixture(scope="module")
def single(source: Path, folder: Path) -> Path:
    tuned_on(1, EXITS, source, folder / "single")
    return folder / "single"


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Of the run's newest whole checkpoint."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return {name: tensor.read() for name, tensor in read_checkpoint(newest).items()}


def losses(run: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {key: row[key] for key in row if key.startswith("train/loss/")} for row in rows if "train/lr" in row}


def test_tuned_exits_are_merged_into_a_whole_model(source: Path, single: Path) -> None:
    """Those after 1 and 2 are new, exit_03 is as it was, and so is the rest of the model."""
    old, new = tensors(source), tensors(single)
    replaced = ("heads.exit_01.", "heads.exit_02.")
    kept = {name for name in old if not name.startswith(replaced)}
    assert any(name.startswith("layers.4.") for name in kept)
    assert any(name.startswith("heads.exit_03.") for name in kept)
    assert {name for name in new if not name.startswith(replaced)} == kept
    assert all(torch.equal(old[name], new[name]) and old[name].dtype == new[name].dtype for name in kept)
    parts = {name.rpartition("exit_")[2].split(".")[1] for name in new if name.startswith(replaced)}
    assert parts == {"norm", "mlp_norm", "mlp", "block", "output"}
    assert json.loads((single / "status.json").read_text())["backbone"]


def test_exits_learn_and_the_final_head_stays(single: Path) -> None:
    before, after = ({row["head"]: row for row in table(single, name)} for name in ("exits_untuned", "exits"))
    for head in ("exit_01", "exit_02"):
        assert float(after[head]["loss"]) < float(before[head]["loss"])
    for head in ("exit_03", "final"):
        assert after[head] == before[head]


def table(run: Path, name: str) -> list[dict[str, str]]:
    with (run / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_tunes_alike(name: str, source: Path, single: Path, folder: Path) -> None:
    world, overrides = LAYOUTS[name]
    results = tuned_on(world, [*EXITS, *overrides], source, folder / name)
    assert all(result["eval/loss/exit_01"] == results[0]["eval/loss/exit_01"] for result in results)
    for step, row in losses(folder / name).items():
        assert row == pytest.approx(losses(single)[step], rel=2e-4)
    assert_alike(tensors(folder / name), tensors(single))


def assert_alike(new: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """To rounding in the exits that are tuned, to the bit in all else."""
    assert set(new) == set(wanted)
    for key, tensor in wanted.items():
        exact = not key.startswith(("heads.exit_01", "heads.exit_02"))
        # Adam's first steps divide by the gradient's size and magnify what rounding leaves of it
        assert torch.equal(new[key], tensor) if exact else (new[key] - tensor).norm() < 5e-3 * tensor.norm(), key


@pytest.mark.parametrize("overrides", [[], ["precision=bf16"]], ids=["fp32", "bf16"])
def test_a_resumed_run_equals_an_uninterrupted_one(overrides: list[str], source: Path, folder: Path) -> None:
    """Bit for bit, from the checkpoint after 4 of 6 steps; on two stages, of which the first has nothing to tune."""
    exits = ["exits.layers=[2]", "exits.head=mlp", "parallel=pp2", *overrides]
    whole, resumed = folder / f"whole{len(overrides)}", folder / f"resumed{len(overrides)}"
    tuned_on(2, exits, source, whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints")
    shutil.rmtree(resumed / "tuning" / "step_0000006")
    workers.run(2, run_task, ["task=tune", f"resume={resumed}"], str(resumed))
    expected, actual = tensors(whole), tensors(resumed)
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert losses(resumed) == losses(whole)


def test_a_run_from_kept_hidden_states_is_the_same(source: Path, single: Path, folder: Path) -> None:
    """The first fills the folder, the others pass no layer, and the last builds none; bit for bit, since they are kept as they
    are. Exits of other heads build theirs alone as well, on each stage, with the matrix that they share with the model."""
    kept = [f"tuning.hidden_cache={folder / 'states'}", "tuning.hidden_cache_dtype=fp32", "tuning.evaluate=false"]
    alone = [*TUNING, *kept, f"checkpoint={source}", "trainer.val_every=0"]
    expected = tensors(single)
    for name, options in {"filling": [], "filled": [], "alone": ["trainer.val_every=0"]}.items():
        tuned_on(1, [*EXITS, *kept, *options], source, folder / name)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors(folder / name).items())
    (states,) = (folder / "states").iterdir()
    assert {file.name for file in states.iterdir()} == {f"layer_{n}{what}.bin" for n in (1, 2) for what in ("", "_written")}
    assert (states / "layer_1.bin").stat().st_size == 6 * 8 * 32 * 32 * 4, "steps, sequences, tokens, channels, bytes"
    norms = ["exits.layers=[1,2]", "exits.head=norm", "parallel=pp2"]
    built = workers.run(2, parameters_built, [*alone, *norms], str(folder / "norms"))
    assert built == [["heads.exit_01.norm.weight", "output.weight"], ["heads.exit_02.norm.weight", "output.weight"]]
    (whole,) = workers.run(1, parameters_built, [*alone, *norms[:-1], "trainer.max_steps=7"], str(folder / "longer"))
    assert {name.split(".")[0] for name in whole} == {"embedding", "layers", "heads"}, "the seventh step is not kept"


DISTILLED = [*EXITS, "tuning=distillation", "tuning.distillation.weight=1.0", "tuning.evaluate=false"]


def test_distillation_over_stages_is_that_on_one(source: Path, single: Path, folder: Path) -> None:
    """The first step sees what plain tuning sees; what it learns is something else, and the same on both layouts."""
    for name, layout in {"distilled": [], "distilled_pp2": ["parallel=pp2"]}.items():
        tuned_on(1 + len(layout), [*DISTILLED, *layout], source, folder / name)
    plain, one, two = (losses(folder / name) for name in ("single", "distilled", "distilled_pp2"))
    exits = ("train/loss/exit_01", "train/loss/exit_02")
    assert all(one[1][name] == pytest.approx(plain[1][name], rel=1e-6) for name in exits)
    assert all(one[6][name] != pytest.approx(plain[6][name], rel=1e-4) for name in exits), (one[6], plain[6])
    assert all(two[step] == pytest.approx(row, rel=2e-4) for step, row in one.items())
    assert_alike(tensors(folder / "distilled_pp2"), tensors(folder / "distilled"))


def test_of_conversations_answers_alone_are_learned(source: Path, folder: Path) -> None:
    """The first step's losses are those of the source's own exits on the labels that the assistant says, by plain autograd."""
    turns = "{% for message in messages %}{{ message.role }}:\n{{ message.content }}\n{% endfor %}"
    (source / "chat_template.jinja").write_text(turns + "{% if add_generation_prompt %}assistant:\n{% endif %}")
    files = sorted(MODULES.glob("*.py"))[:20]
    chats = [
        {"messages": [{"role": "user", "content": file.name}, {"role": "assistant", "content": file.read_text()[:400]}]}
        for file in files
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    of_text = TEXT[:3]
    asked = [*(option for option in TUNING if option not in of_text), "data=chats", f"data.path={path}", f"checkpoint={source}"]
    workers.run(1, run_task, [*asked, "tuning.evaluate=false", "trainer.val_every=0"], str(folder / "answers"))
    run = RunDirectory(folder / "answers")
    config, corpus = from_yaml(run.config.read_text()), Corpus.load(run.corpus)
    plan = Plan.of_tuning(config, corpus.vocab_size)
    batch = training_batches(config, corpus, plan.layout, 0, 0).batch(0)
    assert 0.2 < batch.loss_mask.mean() < 0.95
    parameters = {name: tensor.double() for name, tensor in tensors(source).items()}
    _, means = Reference(plan.spec, parameters).losses(batch, HeadWeights(dict.fromkeys(plan.spec.heads, 1.0)))
    begin = losses(folder / "answers")[1]
    del begin["train/loss/total"]
    assert begin == pytest.approx({f"train/loss/{head}": float(mean) for head, mean in means.items()}, rel=1e-5)


def test_a_tuned_run_is_read_like_any_other(single: Path, folder: Path) -> None:
    """Its exits can be tuned on, and then stand beside those that are new."""
    workers.run(
        2,
        run_task,
        [
            *TUNING,
            f"checkpoint={single}",
            "parallel=pp2",
            "exits.layers=[4]",
            "exits.head=norm",
            "exits.tie_output=false",
            "trainer.max_steps=1",
        ],
        str(folder / "again"),
    )
    old, new = tensors(single), tensors(folder / "again")
    assert set(new) - set(old) == {"heads.exit_04.norm.weight", "heads.exit_04.output.weight"}
    assert all(torch.equal(new[name], old[name]) for name in old)
