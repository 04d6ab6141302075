"""Requests that schemathesis makes up out of the server's own OpenAPI document: none is answered with a fault of the server's.

`pytest -s tests/serving/test_fuzzing.py` prints how many were made and how they were answered; `FUZZ_REQUESTS` asks for more.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections import Counter

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from tests.serving.service import Service

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "40"))
PATHS = ("/v1/completions", "/v1/chat/completions")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SLOW = list(HealthCheck)


def document(served: Service) -> dict:
    return httpx.get(served.url + "/openapi.json").json()


def narrowed(published: dict) -> dict:
    """The document with what this one server can do: requests by it are answered."""
    narrow = copy.deepcopy(published)
    bounds = {
        "model": {"const": "reference_model"},
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": 3},
        "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 3},
        "n": {"type": "integer", "minimum": 1, "maximum": 2},
        "decoding": {"enum": ["catch_up", "self_speculative", "kv_recompute"]},
        "exit_threshold": {"type": "number", "minimum": 0, "maximum": 1},
        "exit_layers": {"enum": [[3], [6], [9], [3, 6], [6, 9], [3, 6, 9]]},
        "prompt": {"anyOf": [{"type": "string", "maxLength": 40}, {"type": "array", "items": {"type": "string", "maxLength": 20},
                   "minItems": 1, "maxItems": 3}, {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 900},
                   "minItems": 1, "maxItems": 30}]},
    }  # fmt: skip
    for name in ("CompletionRequest", "ChatRequest"):
        properties = narrow["components"]["schemas"][name]["properties"]
        assert {"max_tokens", "exit_layers", "decoding"} <= set(properties)
        properties |= {field: bound for field, bound in bounds.items() if field in properties}
        properties.pop("stream_options")  # needs stream=true, which no schema says
    narrow["components"]["schemas"]["ChatRequest"]["properties"].pop("top_logprobs")  # needs logprobs=true
    narrow["components"]["schemas"]["ChatRequest"]["properties"]["messages"] |= {"maxItems": 2}
    narrow["components"]["schemas"]["TextPart"]["properties"]["text"] |= {"maxLength": 8}
    text, parts = narrow["components"]["schemas"]["Message"]["properties"]["content"]["anyOf"]
    text["maxLength"], parts["maxItems"] = 20, 2
    return narrow


def fuzz(served: Service, described: dict, path: str, mode: GenerationMode) -> Counter[int]:
    """Send what the document allows (or, in negative mode, forbids); returns how often each status came back."""
    operation = schemathesis.openapi.from_dict(described)[path]["POST"]
    statuses, refused = Counter(), Counter()

    @seed(11)
    @settings(max_examples=REQUESTS, deadline=None, suppress_health_check=SLOW, database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        # sent as it is: schemathesis' own `call` stops reading a stream after some events
        answer = requests.request(**case.as_transport_kwargs(base_url=served.url), timeout=60)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)
        if answer.status_code == 200:
            is_whole(answer.text, answer.headers["content-type"])
        else:
            says_what_is_wrong(answer.json()["error"])
            refused[answer.json()["error"]["param"]] += 1

    send()
    print(f"{path} {mode.name.lower()}: {sum(statuses.values())} requests, answers {dict(statuses)}, refused for {dict(refused)}")
    assert served.load()["status"] == "ok"
    return statuses


def is_whole(text: str, kind: str) -> None:
    if kind.startswith("text/event-stream"):
        *events, last = re.findall(r"^data: (.*)$", text, re.MULTILINE)
        assert last == "[DONE]"
        chunks = [json.loads(event) for event in events]
        finished = {choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]}
        assert finished == {choice["index"] for chunk in chunks for choice in chunk["choices"]}
    else:
        choices = json.loads(text)["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        assert all(choice["finish_reason"] for choice in choices)


def says_what_is_wrong(error: dict) -> None:
    assert error["message"]
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert error["param"] is None or error["message"].startswith(f"{error['param']}: "), error


@pytest.mark.parametrize("path", PATHS)
def test_what_the_document_allows_is_answered_or_refused(path: str, served: Service) -> None:
    statuses = fuzz(served, document(served), path, GenerationMode.POSITIVE)
    assert set(statuses) <= {200, 400, 404}


@pytest.mark.parametrize("path", PATHS)
def test_what_this_server_can_do_is_answered(path: str, served: Service) -> None:
    statuses = fuzz(served, narrowed(document(served)), path, GenerationMode.POSITIVE)
    assert set(statuses) == {200}


@pytest.mark.parametrize("path", PATHS)
def test_what_the_document_forbids_is_refused(path: str, served: Service) -> None:
    statuses = fuzz(served, document(served), path, GenerationMode.NEGATIVE)
    assert set(statuses) == {400}
