"""Every family: imported, a model computes what `transformers` computes; exported again, it is what it was, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests import workers
from tests.convert import our_logits
from tests.convert.conversions import exported, imported
from tests.convert.hugging_face import MODELS, logits, save, token_ids

TOLERANCE = 1e-5


class Imported:
    """A model's folder, the run it became, and the logits that `transformers` computes."""

    def __init__(self, row: str, folder: Path):
        self.source, self.run = folder / row, folder / f"{row}_run"
        model = save(row, self.source)
        self.kind, self.ids = type(model), token_ids()
        self.wanted = logits(model, self.ids)
        self.spec = imported(self.source, self.run)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Imported]:
    folder = tmp_path_factory.mktemp("families")
    return {row: Imported(row, folder) for row in MODELS}


def difference(got: np.ndarray, wanted: torch.Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return float((torch.from_numpy(got) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.dist
@pytest.mark.parametrize("row", MODELS)
def test_logits(row: str, models: dict[str, Imported]) -> None:
    model = models[row]
    ids = model.ids.numpy()
    whole = workers.run(1, our_logits.whole_sequences, str(model.run), [], ids)[0]
    assert list(whole) == ["final"]
    stepwise = workers.run(1, our_logits.token_by_token, str(model.run), ids[0])[0]
    found = difference(whole["final"], model.wanted), difference(stepwise, model.wanted[0])
    print(f"\n{row}: whole sequences {found[0]:.1e}, token by token {found[1]:.1e} of the largest logit")
    assert max(found) < TOLERANCE


@pytest.mark.dist
@pytest.mark.parametrize("row", ["llama3", "gpt2", "gpt_neox", "olmo2"])
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_logits_on_two_ranks(row: str, layout: str, models: dict[str, Imported]) -> None:
    model = models[row]
    uneven = ["parallel.layers_per_stage=[2,1]", "decoding=pipeline"] if layout == "pp2" else []
    ranks = workers.run(2, our_logits.whole_sequences, str(model.run), [f"parallel={layout}", *uneven], model.ids.numpy())
    finals = [heads["final"] for heads in ranks if "final" in heads]
    assert len(finals) == (2 if layout == "tp2" else 1)
    assert difference(np.concatenate(finals, axis=2), model.wanted) < TOLERANCE


@pytest.mark.dist
def test_nine_heads_in_three_groups_on_three_ranks(models: dict[str, Imported], tmp_path: Path) -> None:
    model = models["smollm2"]
    imported(model.source, tmp_path / "run", "model.vocab_multiple=192")
    ranks = workers.run(3, our_logits.whole_sequences, str(tmp_path / "run"), ["parallel.tp=3"], model.ids.numpy())
    assert difference(np.concatenate([heads["final"] for heads in ranks], axis=2), model.wanted) < TOLERANCE


@pytest.mark.parametrize("row", MODELS)
def test_the_way_back(row: str, models: dict[str, Imported], tmp_path: Path) -> None:
    model = models[row]
    folder = exported(model.run, tmp_path / "back")
    there, back = load_file(model.source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name], back[name]) and there[name].dtype == back[name].dtype for name in there)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is model.kind
    assert not any(info.values()), info
    assert torch.equal(logits(loaded.eval(), model.ids), model.wanted)


def test_shards_and_half_precision(models: dict[str, Imported], tmp_path: Path) -> None:
    """Read from several files and written to several; bf16 stays what it is, bit for bit."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"].source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    imported(tmp_path / "source", tmp_path / "run")
    folder = exported(tmp_path / "run", tmp_path / "back", "convert.shard_gigabytes=2e-5")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert max(shard.stat().st_size for shard in shards) < 30_000
    back = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    pairs = zip(model.state_dict().items(), back.state_dict().items(), strict=True)
    assert all(one == other and torch.equal(a, b) and a.dtype == b.dtype for (one, a), (other, b) in pairs)
    ids = models["llama"].ids
    got = workers.run(1, our_logits.whole_sequences, str(tmp_path / "run"), [], ids.numpy())[0]["final"]
    assert difference(got, logits(back.float().eval(), ids)) < TOLERANCE


def test_exits_come_along_when_they_are_asked_for(models: dict[str, Imported], tmp_path: Path) -> None:
    model = models["llama"]
    asked = ["exits.layers=[1,2]", "exits.head=[mlp,norm]", "exits.tie_output=[true,false]", "exits.init=copy"]
    spec = imported(model.source, tmp_path / "run", *asked)
    assert (spec.heads, model.spec.heads) == (["exit_01", "exit_02", "final"], ["final"])
    heads = workers.run(1, our_logits.whole_sequences, str(tmp_path / "run"), [], model.ids.numpy())[0]
    assert difference(heads["final"], model.wanted) < TOLERANCE
    # a copied norm and output matrix make the logit lens: the model without its later layers
    shallow = transformers.AutoModelForCausalLM.from_pretrained(model.source).eval()
    shallow.model.layers = shallow.model.layers[:2]
    assert difference(heads["exit_02"], logits(shallow, model.ids)) < TOLERANCE
