"""The official client against what decoding alone gives."""

from __future__ import annotations

import openai
import pytest

from tests.serving.conftest import TEMPLATE
from tests.serving.service import MODEL, PROMPTS, Loaded, Service, said, sampled


@pytest.fixture(scope="module")
def client(served: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("mode", ["catch_up", "full", "kv_recompute", "self_speculative"])
def test_a_completion_is_that_of_decoding_alone(mode: str, client: openai.OpenAI, model: Loaded) -> None:
    alone = model.alone(PROMPTS[2], 24, mode, 0.5)
    extension = {"decoding": mode} | ({} if mode == "full" else {"exit_threshold": 0.5})
    whole = client.completions.create(model=MODEL, prompt=PROMPTS[2], max_tokens=24, temperature=0, extra_body=extension)
    (choice,) = whole.choices
    assert (choice.text, said(choice.model_extra), choice.finish_reason) == (alone.text, alone.said(), "length")
    assert (whole.usage.completion_tokens, whole.model) == (24, MODEL)
    for token, wanted in zip(choice.tokens, alone.tokens, strict=True):
        assert (token["confidence"], token["logprob"]) == pytest.approx((wanted.confidence, wanted.logprob), abs=1e-5)
        assert token.get("drafted_by") == wanted.drafted_by
    assert (len({token["exit_layer"] for token in choice.tokens}) > 1) == (mode in ("catch_up", "kv_recompute"))

    stream = client.completions.create(
        model=MODEL, prompt=PROMPTS[2], max_tokens=24, temperature=0, stream=True, extra_body=extension
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == alone.text
    assert [pair for chunk in chunks for pair in said(chunk.model_extra)] == alone.said()
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert len(chunks) > 12, "tokens come as they are said"


def test_choices_have_seeds_of_their_own_and_several_prompts_come_in_order(client: openai.OpenAI, model: Loaded) -> None:
    whole = client.completions.create(model=MODEL, prompt=list(PROMPTS[:2]), max_tokens=12, temperature=0.9, seed=5, n=2)
    wanted = [model.alone(prompt, 12, sampling=sampled(0.9), seed=seed) for prompt in PROMPTS[:2] for seed in (5, 6)]
    assert [(choice.index, choice.text) for choice in whole.choices] == list(enumerate(alone.text for alone in wanted))
    assert len({choice.text for choice in whole.choices}) == 4
    stream = client.completions.create(
        model=MODEL,
        prompt=PROMPTS[0],
        max_tokens=12,
        temperature=0.9,
        seed=5,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, usage = {0: "", 1: ""}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [texts[0], texts[1]] == [alone.text for alone in wanted[:2]]
    ended = sum(len(alone.tokens) for alone in wanted[:2])
    assert (usage.completion_tokens, usage.total_tokens) == (ended, usage.prompt_tokens + ended)


def test_logprobs_and_alternatives(client: openai.OpenAI, model: Loaded) -> None:
    alone = model.alone(PROMPTS[1], 10)
    (choice,) = client.completions.create(model=MODEL, prompt=PROMPTS[1], max_tokens=10, temperature=0, logprobs=3).choices
    assert choice.logprobs.token_logprobs == pytest.approx([token.logprob for token in alone.tokens], abs=1e-5)
    for token, others in zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True):
        assert max(others, key=others.get) == token
        assert len(others) == 3
    rebuilt = [
        choice.text[start:end]
        for start, end in zip(choice.logprobs.text_offset, [*choice.logprobs.text_offset[1:], None], strict=True)
    ]
    assert rebuilt == choice.logprobs.tokens, "these are whole characters"


def test_a_chat_is_the_completion_of_what_its_template_makes(client: openai.OpenAI, model: Loaded) -> None:
    messages = [{"role": "system", "content": "Python"}, {"role": "user", "content": [{"type": "text", "text": " sort a list "}]}]
    assert "trim" in TEMPLATE
    alone = model.alone("# system: Python\n# user: sort a list\ndef ", 12)
    whole = client.chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", alone.text)
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * len(alone.tokens)
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == alone.text
    stream = list(client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0, stream=True))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == alone.text
    assert stream[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stop", ["\n", ["(self", ")"], "never in it"])
def test_a_stop_string_ends_it_and_is_not_told(stop: str | list[str], client: openai.OpenAI, model: Loaded) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    alone = model.alone(PROMPTS[2], 24, stop=stops)
    asked = {"model": MODEL, "prompt": PROMPTS[2], "max_tokens": 24, "temperature": 0, "stop": stop}
    whole = client.completions.create(**asked)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    assert whole.choices[0].text == streamed == alone.text
    assert whole.choices[0].finish_reason == ("length" if stop == "never in it" else "stop")
    assert whole.usage.completion_tokens == len(alone.tokens)


def test_exits_that_a_request_chooses(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": PROMPTS[2], "max_tokens": 24, "temperature": 0}
    layers = set()
    for choice, allowed in (
        ({"exit_layers": [6], "exit_threshold": 0.0}, {6}),
        ({"exit_threshold": [1.0, 0.0, 0.5]}, {3, 6}),
        ({}, {3, 6, 9, 12}),
    ):
        tokens = client.completions.create(**asked, extra_body=choice).choices[0].tokens
        found = {token["exit_layer"] for token in tokens[1:]}  # the first one comes with the prompt, from the final head
        assert found <= allowed
        layers |= found
    assert layers == {3, 6, 9, 12}


def test_models_and_mistakes(client: openai.OpenAI) -> None:
    (found,) = client.models.list().data
    assert (found.id, found.exit_layers, found.num_layers) == (MODEL, [3, 6, 9], 12)
    assert client.models.retrieve(MODEL).decodings == ["full", "catch_up", "kv_recompute", "self_speculative"]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", extra_body={"exit_threshold": 1.5})
    assert (caught.value.param, caught.value.code) == ("exit_threshold", "invalid_value")
