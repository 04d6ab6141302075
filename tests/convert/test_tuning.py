"""The whole way: a model of `transformers` becomes a run, gets exits, is tuned, and goes back with them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from eellm.data.tokenizer_files import load_tokenizer
from tests import workers
from tests.convert import hugging_face, our_logits
from tests.convert.conversions import exported, imported
from tests.convert.test_parity import TOLERANCE, difference
from tests.tasks.tuning import TUNING, run_task
from tests.train.fitting import MODULES

EXITS = ["exits.layers=[1,2]", "exits.head=[mlp,norm]", "exits.tie_output=[true,false]", "exits.init=copy"]
VOCABULARY = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` of `transformers`, the run `untuned` made of it, the run `tuned`, and `exported` of that."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        shape = hugging_face.MODELS["llama"][1] | {"vocab_size": VOCABULARY, "eos_token_id": 0}
        patch.setitem(hugging_face.MODELS, "llama", ("Llama", shape))
        hugging_face.save("llama", folder / "source")
    write_tokenizer(folder / "source")
    imported(folder / "source", folder / "untuned")
    workers.run(1, run_task, [*TUNING, *EXITS, f"checkpoint={folder / 'untuned'}"], str(folder / "tuned"))
    exported(folder / "tuned", folder / "exported")
    return folder


def write_tokenizer(folder: Path) -> None:
    tokenizer = ByteLevelBPETokenizer()
    texts = sorted(str(path) for path in MODULES.glob("*.py"))
    tokenizer.train(texts, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def table(file: Path) -> dict[str, dict[str, str]]:
    with file.open() as rows:
        return {row["head"]: row for row in csv.DictReader(rows)}


@pytest.mark.dist
def test_exits_learn_and_the_final_head_stays(folder: Path) -> None:
    before, after = (table(folder / "tuned" / f"{name}.csv") for name in ("exits_untuned", "exits"))
    assert list(after) == ["exit_01", "exit_02", "final"]
    for head in ("exit_01", "exit_02"):
        assert float(after[head]["loss"]) < float(before[head]["loss"]) - 0.1
    assert after["final"] == before["final"]


@pytest.mark.dist
def test_what_is_exported_computes_what_was_tuned(folder: Path) -> None:
    """The backbone bit for bit the source, each exit's logits those of the run."""
    text = "def parse(self, text, headersonly=False):"
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder / "exported")(text).input_ids])
    assert ids[0].tolist() == load_tokenizer(folder / "tuned" / "tokenizer.json", None).encode_prompt(text)
    source, plain = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("source", "exported"))
    assert torch.equal(hugging_face.logits(plain, ids), hugging_face.logits(source, ids))
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", trust_remote_code=True).eval()
    ours = workers.run(1, our_logits.whole_sequences, str(folder / "tuned"), [], ids.numpy())[0]
    with torch.no_grad():
        out = model(ids, output_exit_logits=True)
    theirs = {"exit_01": out.exit_logits[1], "exit_02": out.exit_logits[2], "final": out.logits}
    assert set(theirs) == set(ours)
    assert all(difference(ours[name], logits) < TOLERANCE for name, logits in theirs.items())
