"""The modelling file that travels with exits, loaded as users load it, against plain `transformers` and forwards from scratch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eellm.convert.modeling_early_exit import EarlyExitForCausalLM
from tests.convert.backbones import FAMILIES, NUM_LAYERS, exit_options

MIXED = (
    exit_options(1, "norm", temperature=3.0),
    exit_options(2, "mlp", tie_output=False, temperature=2.0),
    exit_options(3, "block"),
)
HEADS = {
    "embedding": (
        exit_options(2, "embedding", temperature=9.0),
        exit_options(3, "embedding", tie_output=False, temperature=9.0),
    ),
    "norm": (exit_options(1, "norm", temperature=3.0), exit_options(4, "norm", tie_output=False)),
    "mlp": (exit_options(1, "mlp", temperature=3.0), exit_options(4, "mlp", tie_output=False, temperature=2.0)),
    "block": (exit_options(1, "block", temperature=3.0), exit_options(2, "block"), exit_options(4, "block", tie_output=False)),
}
PROMPT = torch.tensor([[5, 17, 3, 42, 8]])
COUNT = 24
GREEDY = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
DRAFTED = {"max_new_tokens": COUNT, "do_sample": False, "assistant_early_exit": 2}


def save(folder: Path, family: str = "llama", exits: tuple = MIXED) -> Any:
    """A model whose exits are no copies of the backbone, written to a folder."""
    torch.manual_seed(3)
    model = EarlyExitForCausalLM._from_config(FAMILIES[family](early_exits=exits)).eval()
    with torch.no_grad():
        for parameter in model.exits.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def from_scratch(model: Any, threshold: float, exit_layers: list[int] | None = None) -> tuple[list[int], list[int]]:
    """(text, layers passed by each new token): every token from a forward over the whole text so far."""
    text, layers = PROMPT, []
    for step in range(COUNT):
        out = model(text, output_exit_logits=True)
        logits, layer = out.logits[0, -1], NUM_LAYERS
        for exit_ in model.config.early_exits if step else []:  # a prompt's first token is the final head's
            said = out.exit_logits[exit_["layer"]][0, -1]
            asked = exit_layers is None or exit_["layer"] in exit_layers
            if asked and (said / exit_["temperature"]).softmax(-1).max() >= threshold:
                logits, layer = said, exit_["layer"]
                break
        text = torch.cat((text, logits.argmax().view(1, 1)), dim=1)
        layers.append(layer)
    return text[0].tolist(), layers


def check_early_exits(model: Any, exit_layers: list[int] | None = None) -> None:
    """At a threshold that the first exit asked reaches about every other time."""
    first = model.early_exit(min(exit_layers or model.exits, key=int))
    text = model.generate(PROMPT, **GREEDY)
    sure = (model(text, output_exit_logits=True).exit_logits[first.layer] / first.temperature).softmax(-1).amax(-1)
    below, above = sure[0, PROMPT.shape[1] :].sort().values[COUNT // 2 - 1 : COUNT // 2 + 1].tolist()
    threshold = (below + above) / 2  # no probability is at it, so rounding decides nothing
    options = {"exit_threshold": threshold, "exit_layers": exit_layers, "return_dict_in_generate": True}
    out = model.generate(PROMPT, **GREEDY, **options)
    text, layers = from_scratch(model, threshold, exit_layers)
    assert (out.sequences[0].tolist(), out.exit_layers) == (text, layers)
    assert len(set(layers[1:])) > 1, "nothing has been shown"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_load_is_the_backbone(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save(tmp_path, family)
    logging.getLogger("transformers").addHandler(caplog.handler)
    plain, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert type(plain).__module__.startswith(f"transformers.models.{family}.")
    assert (caplog.messages, any(told.values())) == ([], False)
    assert torch.equal(plain(PROMPT).logits, saved(PROMPT).logits)
    assert plain.num_parameters() < saved.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_leave_where_a_forward_from_scratch_says(family: str, tmp_path: Path) -> None:
    save(tmp_path, family)
    check_early_exits(load(tmp_path))


@pytest.mark.parametrize("heads", HEADS)
def test_every_head(heads: str, tmp_path: Path) -> None:
    save(tmp_path, exits=HEADS[heads])
    check_early_exits(load(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_out_of_reach_is_plain_generation(family: str, tmp_path: Path) -> None:
    """Greedy, and sampling with the same random numbers: the loop around the model is transformers' own."""
    save(tmp_path, family)
    plain, model = AutoModelForCausalLM.from_pretrained(tmp_path), load(tmp_path)
    for options in (GREEDY, GREEDY | {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8}):
        torch.manual_seed(1)
        expected = plain.generate(PROMPT, **options)
        for threshold in ({}, {"exit_threshold": 1.5}):
            torch.manual_seed(1)
            assert torch.equal(model.generate(PROMPT, **options, **threshold), expected)


def test_some_exits_may_be_asked(tmp_path: Path) -> None:
    save(tmp_path)
    check_early_exits(load(tmp_path), [2, 3])
    check_early_exits(load(tmp_path), [3])


def test_rows_of_a_batch_are_as_alone(tmp_path: Path) -> None:
    save(tmp_path)
    model = load(tmp_path)
    rows = [[5, 17, 3, 42, 8], [9, 9, 31]]
    alone = [model.generate(torch.tensor([row]), **GREEDY, exit_threshold=0.5)[0].tolist() for row in rows]
    end = alone[1][6]  # where the second one stops
    alone[1] = alone[1][:7]
    alone[0] = alone[0][: alone[0].index(end, 5) + 1] if end in alone[0][5:] else alone[0]
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    padded = torch.tensor([rows[0], [0, 0, *rows[1]]])
    out = model.generate(padded, attention_mask=mask, **GREEDY, eos_token_id=end, exit_threshold=0.5).tolist()
    width = max(len(alone[0]), len(alone[1]) + 2)
    assert out == [row + [0] * (width - len(row)) for row in (alone[0], [0, 0, *alone[1]])]


@pytest.mark.parametrize("family", FAMILIES)
def test_exits_draft_for_transformers_assisted_generation(family: str, tmp_path: Path) -> None:
    """The text is the full model's, and who drafts is the exit."""
    save(tmp_path, family)
    plain, model = AutoModelForCausalLM.from_pretrained(tmp_path), load(tmp_path)
    expected = plain.generate(PROMPT, **GREEDY)
    exits = model(PROMPT, output_exit_logits=True).exit_logits
    for layer in (1, 2):
        assert torch.equal(model.generate(PROMPT, **DRAFTED | {"assistant_early_exit": layer}), expected)
        model.base_model.config.num_hidden_layers = layer  # what transformers does while drafting
        torch.testing.assert_close(model(PROMPT).logits, exits[layer])
        torch.testing.assert_close(model(PROMPT, logits_to_keep=2).logits, exits[layer][:, -2:])
        model.base_model.config.num_hidden_layers = NUM_LAYERS


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt2", "gpt_neox"}))
def test_the_plain_backbone_drafts_with_its_own_norm_and_matrix(family: str, tmp_path: Path) -> None:
    """Without our code nobody knows of exits: the draft is an exit's only while its norm is a copy and its matrix tied.

    transformers' GPT-2 and GPT-NeoX do not look at the number of layers and cannot draft at all.
    """
    torch.manual_seed(3)
    copied = EarlyExitForCausalLM._from_config(FAMILIES[family](early_exits=(exit_options(2, "norm"),))).eval()
    copied.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.generate(PROMPT, **DRAFTED), plain.generate(PROMPT, **GREEDY))
    plain.config.num_hidden_layers = 2
    torch.testing.assert_close(plain(PROMPT).logits, copied(PROMPT, output_exit_logits=True).exit_logits[2])


def test_what_cannot_draft_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = save(tmp_path)
    for layer in (3, 4, 7):
        with pytest.raises(ValueError, match=rf"assistant_early_exit={layer}: .* after layers \[1, 2\]"):
            model.generate(PROMPT, **DRAFTED | {"assistant_early_exit": layer})
    assert model.config.num_hidden_layers == NUM_LAYERS


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exit_threshold": 0.5, "num_beams": 2}, "no beams"),
        ({"exit_threshold": 0.5, "assistant_early_exit": 1}, "without assistant_early_exit"),
        ({"exit_threshold": 0.5, "exit_layers": [1, 4]}, r"exits after layers \[1, 2, 3\]"),
        ({"exit_layers": [1]}, "exit_threshold must say"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict, reason: str, tmp_path: Path) -> None:
    model = save(tmp_path)
    with pytest.raises(ValueError, match=reason):
        model.generate(PROMPT, **GREEDY | options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saving_and_loading_keeps_every_byte(family: str, tmp_path: Path) -> None:
    first = save(tmp_path / "first", family)
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = load(tmp_path / "second")
    assert not again.training
    assert again.state_dict().keys() == first.state_dict().keys()
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in again.state_dict().items())
    half = load(tmp_path / "first", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_exits_can_be_trained_in_transformers(tmp_path: Path) -> None:
    """Padded batches give each row's logits, and gradients reach the exits."""
    model = save(tmp_path)
    alone = model(PROMPT, output_exit_logits=True).exit_logits
    padded, mask = torch.cat((torch.zeros(1, 2, dtype=torch.long), PROMPT), dim=1), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4]])
    out = model(padded, attention_mask=mask, position_ids=positions, output_exit_logits=True, labels=padded)
    for layer, logits in out.exit_logits.items():
        # matrices of other shapes round otherwise where they are cut for several threads: parity's bound, not an element's own
        torch.testing.assert_close(logits[:, 2:], alone[layer], rtol=0, atol=1e-5 * float(alone[layer].abs().max().detach()))
    sum(logits[:, 2:].square().mean() for logits in out.exit_logits.values()).backward()
    assert all(parameter.grad is not None for parameter in model.exits.parameters())
