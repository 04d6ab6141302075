"""What a client can get wrong: the answer is a 4xx in OpenAI's shape that names the field."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.serving.service import Loaded, Service, service

GOOD = {"prompt": "x", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("param", "change"),
    [
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": 5}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [1.5]}),
        ("prompt", {"prompt": [1, "x"]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [999_999]}),
        ("prompt", {"prompt": [[5], []]}),
        ("prompt", {"prompt": "x " * 300}),
        ("prompt", {"prompt": ["x"] * 17}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": "5"}),
        ("max_tokens", {"max_tokens": True}),
        ("max_tokens", {"max_tokens": 256}),
        ("max_tokens", {"max_tokens": 10**30}),
        ("n", {"n": 17}),
        ("n", {"n": 0}),
        ("n", {"n": 9, "prompt": ["x", "y"]}),
        ("stop", {"stop": ""}),
        ("stop", {"stop": ["a"] * 17}),
        ("stop", {"stop": [5]}),
        ("seed", {"seed": 2**63}),
        ("seed", {"seed": "x"}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": 2.1}),
        ("temperature", {"temperature": float("nan")}),
        ("top_p", {"top_p": 0}),
        ("top_p", {"top_p": float("inf")}),
        ("top_k", {"top_k": -1}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": True}),
        ("stream", {"stream": "yes"}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options.include", {"stream": True, "stream_options": {"include": True}}),
        ("decoding", {"decoding": "pipeline"}),
        ("decoding", {"decoding": "fast"}),
        ("exit_threshold", {"exit_threshold": 1.01}),
        ("exit_threshold", {"exit_threshold": [0.5, 0.5]}),
        ("exit_threshold", {"exit_threshold": []}),
        ("exit_threshold", {"exit_threshold": 0.5, "decoding": "full"}),
        ("exit_layers", {"exit_layers": [4]}),
        ("exit_layers", {"exit_layers": [6, 3]}),
        ("exit_layers", {"exit_layers": [3, 3]}),
        ("exit_layers", {"exit_layers": []}),
        ("echo", {"echo": True}),
        ("best_of", {"best_of": 2}),
        ("suffix", {"suffix": "x"}),
        ("frequency_penalty", {"frequency_penalty": 0.5}),
        ("logit_bias", {"logit_bias": {"5": 1}}),
        ("temprature", {"temprature": 1}),
    ],
)
def test_a_field_of_a_completion(param: str, change: dict, served: Service) -> None:
    body = json.dumps({**GOOD, **change})
    answer = httpx.post(served.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
    refused(answer, param)


@pytest.mark.parametrize(
    ("param", "change"),
    [
        ("messages", {"messages": []}),
        ("messages.0.role", {"messages": [{"role": "wizard", "content": "x"}]}),
        ("messages.0.content", {"messages": [{"role": "user"}]}),
        ("messages.1.content", {"messages": [CHAT["messages"][0], {"role": "user", "content": [{"type": "image_url"}]}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": "<|endoftext|>"}]}),
        ("messages", {"messages": [{"role": "user", "content": "x " * 300}]}),
        ("max_completion_tokens", {"max_completion_tokens": 256}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("tools", {"tools": [{"type": "function"}]}),
        ("response_format", {"response_format": {"type": "json_object"}}),
    ],
)
def test_a_field_of_a_chat(param: str, change: dict, served: Service) -> None:
    refused(httpx.post(served.url + "/v1/chat/completions", json={**CHAT, **change}), param)


def refused(answer: httpx.Response, param: str | None) -> None:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"prompt": 1e999}'),
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_none(body: bytes, served: Service) -> None:
    answer = httpx.post(served.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_neutral_values_of_what_is_not_offered(served: Service) -> None:
    neutral = {
        "echo": False,
        "best_of": 1,
        "suffix": None,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "x",
    }
    assert served.post(**GOOD, **neutral).status_code == 200
    assert served.post("/v1/chat/completions", **CHAT, tools=[], response_format={"type": "text"}).status_code == 200


def test_paths_methods_and_the_end_of_the_context(served: Service) -> None:
    for method, path, status in (("GET", "/v1/completions", 405), ("POST", "/v1/nothing", 404), ("GET", "/../etc", 404)):
        answer = httpx.request(method, served.url + path)
        assert (answer.status_code, set(answer.json())) == (status, {"error"})
    assert served.post(prompt=[5] * 255, max_tokens=1).status_code == 200, "the last position"
    refused(served.post(prompt=[5] * 255, max_tokens=2), "max_tokens")
    refused(served.post(prompt=[5] * 256, max_tokens=1), "prompt")


def test_the_key_and_a_model_without_a_chat_template(model: Loaded, tmp_path) -> None:
    (tmp_path / "key").write_text("sésame\nnot this line")
    with service(model, tmp_path / "run", f"serve.api_key_file={tmp_path / 'key'}", "serve.decodings=[catch_up]") as running:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sésame".encode()}):
            answer = httpx.post(running.url + "/v1/completions", json=GOOD, headers=header)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        key = {"authorization": "Bearer sésame".encode()}
        assert httpx.post(running.url + "/v1/completions", json=GOOD, headers=key).status_code == 200
        assert [httpx.get(running.url + path).status_code for path in ("/", "/health", "/metrics", "/v1/models")] == [
            200,
            200,
            200,
            401,
        ]
        answer = httpx.post(running.url + "/v1/chat/completions", json=CHAT, headers=key)
        refused(answer, "messages")
        assert answer.json()["error"]["code"] == "no_chat_template"
    assert "sésame" not in (tmp_path / "run" / "access.jsonl").read_text()
