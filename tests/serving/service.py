"""A server in this process: the reference model, its engine and HTTP in threads; and what decoding alone gives, the oracle."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import httpx

from eellm.config.compose import compose
from eellm.config.schema import Config, DecodingMode
from eellm.decoding.continuation import Request, Token
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.generation import ContinuedText
from eellm.decoding.policy import build_policy, never_exit
from eellm.decoding.sampling import GREEDY, SamplingOptions
from eellm.mcore.groups import Groups
from eellm.model.stage import Stage
from eellm.serving.server import address_of, listen
from eellm.tasks.context import TaskContext
from eellm.tasks.serve import serve
from eellm.tasks.session import Plan, groups_of, process_group
from eellm.tasks.source import trained_tokenizer
from eellm.tasks.trained import load_trained

MODEL = "reference_model"
PROMPTS = ("import os\nimport ", "def main(", "class TestCase(unittest.TestCase):\n    def ", "    return ", "x = {", "for i in ")


@cache
def config_of(*overrides: str) -> Config:
    return compose(["task=serve", "device=cpu", "serve.port=0", "parallel.dp=1", *overrides])


@dataclass
class Loaded:
    """The reference model in this process."""

    stage: Stage
    groups: Groups

    def alone(self, prompt: str, tokens: int, mode: DecodingMode = "catch_up", threshold: float = 0.8, **changes) -> Alone:
        """The prompt's continuation by a decoder made for it alone. `changes`: sampling, seed, stop."""
        config, tokenizer = config_of(f"exit_policy.threshold={threshold}"), trained_tokenizer(config_of())
        policy = never_exit(self.stage.spec) if mode == "full" else build_policy(config.exit_policy, self.stage.spec)
        decoder, ids = Decoder(self.stage, policy, DecoderOptions(mode, draft_length=3)), tokenizer.encode(prompt)
        request = Request(tokens, changes.get("sampling", GREEDY), changes.get("seed", 0), tokenizer.eod_id)
        sequence, text = decoder.start(ids, request), ContinuedText(tokenizer, ids, changes.get("stop", []))
        while sequence.end is None:
            for _, token in decoder.step():
                text.add(token, last=sequence.end is not None and token is sequence.tokens[-1])
            sequence.stopped = text.cut is not None
        return Alone(text.text, sequence.tokens)


@dataclass(frozen=True)
class Alone:
    text: str
    tokens: list[Token]

    def said(self) -> list[tuple[int, int]]:
        return [(token.id, token.exit_layer) for token in self.tokens]


@contextmanager
def loaded() -> Iterator[Loaded]:
    config = config_of()
    plan = Plan.of(config, trained_tokenizer(config).vocab_size)
    with process_group(config, alone=True) as device, groups_of(plan, device, config.seed) as groups:
        yield Loaded(load_trained(config, plan, groups).stages[0], groups)


@dataclass
class Service:
    url: str
    run_dir: Path
    end: threading.Event = field(default_factory=threading.Event)
    failures: list[BaseException] = field(default_factory=list)

    def post(self, path: str = "/v1/completions", timeout: float = 60, **body) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=timeout)

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "access.jsonl").read_text().splitlines()]

    def load(self) -> dict:
        """What /health says."""
        return httpx.get(self.url + "/health").json()

    def wait_for(self, reached: Callable[[dict], bool], seconds: float = 20) -> None:
        """Until /health says what is wanted."""
        deadline = time.monotonic() + seconds
        while not reached(self.load()):
            assert time.monotonic() < deadline, self.load()
            time.sleep(0.02)


@contextmanager
def service(model: Loaded, run_dir: Path, *overrides: str) -> Iterator[Service]:
    """A server with the engine in a thread of its own; ends as after a signal."""
    run_dir.mkdir(exist_ok=True)
    config, listener = config_of(*overrides), listen("127.0.0.1", 0)
    running = Service(address_of(listener), run_dir)

    def work() -> None:
        try:
            serve(TaskContext(config, run_dir), model.stage, model.groups, listener, running.end.is_set)
        except BaseException as error:
            running.failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                running.load()
                break
            except httpx.TransportError:
                assert thread.is_alive(), running.failures
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield running
    finally:
        running.end.set()
        thread.join(60)
    assert not running.failures


def sampled(temperature: float) -> SamplingOptions:
    return SamplingOptions(temperature)


def said(choice: dict) -> list[tuple[int, int]]:
    """Of a choice as JSON: token ids and layers."""
    return [(token["id"], token["exit_layer"]) for token in choice["tokens"]]
