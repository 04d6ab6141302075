"""A real model: SmolLM2-135M-Instruct out of a GGUF file, converted by the command line, against `transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests import workers
from tests.command_line import run_py
from tests.convert import our_logits
from tests.convert.hugging_face import logits
from tests.convert.test_parity import TOLERANCE, difference

TEXT = "The capital of France is Paris. Once upon a time, in 1999, there was a girl named Lily who paid 12345 dollars for a"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the model twice: `run`, and `exported` from it."""
    folder = tmp_path_factory.mktemp("smollm2")
    said = run_py("task=convert", "convert.source=smollm2", "convert.target=run", cwd=folder).stdout
    assert "run: 134.5M weights, 30 layers, in" in said
    run_py("task=convert", "convert.source=run", "convert.target=exported", "convert.format=huggingface", cwd=folder)
    return folder


@pytest.mark.dist
@pytest.mark.slow
def test_logits(folder: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "exported")
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    wanted = logits(theirs, ids)
    got = workers.run(1, our_logits.whole_sequences, str(folder / "run"), [], ids.numpy())[0]["final"]
    assert difference(got, wanted) < TOLERANCE
    # of the weights themselves: what this model is known to say
    said = theirs.generate(torch.tensor([tokenizer("The capital of France is").input_ids]), max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(said[0]) == "The capital of France is Paris."


@pytest.mark.slow
def test_the_tokenizer_and_its_chat_template_travel(folder: Path) -> None:
    from eellm.config.compose import compose
    from eellm.serving.chat import find_chat_template
    from eellm.serving.schema import Message
    from eellm.tasks.source import trained_tokenizer

    theirs = transformers.AutoTokenizer.from_pretrained(folder / "exported")
    config = compose(["task=generate", f"checkpoint={folder / 'run'}"])
    ours = trained_tokenizer(config)
    assert ours.encode_prompt(TEXT) == theirs(TEXT).input_ids
    assert ours.eod_id == theirs.eos_token_id == 2
    messages = [{"role": "user", "content": "Hello!"}]
    template = find_chat_template(None, folder / "run" / "tokenizer.json", ours)
    assert template is not None
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert template.encode([Message(role="user", content="Hello!")]) == wanted
    described = json.loads((folder / "exported" / "config.json").read_text())
    assert (described["eos_token_id"], described["bos_token_id"], described["torch_dtype"]) == (2, 1, "float32")


@pytest.mark.slow
def test_the_run_generates(folder: Path) -> None:
    prompts = ['decoding.prompts=["The capital of France is"]', "decoding.max_new_tokens=2"]
    run_py("task=generate", "checkpoint=run", "decoding=full", *prompts, "device=cpu", "hydra.run.dir=generated", cwd=folder)
    record = json.loads((folder / "generated" / "generations.jsonl").read_text().splitlines()[0])
    assert record["text"] == " Paris."
