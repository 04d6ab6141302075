"""Many clients at a time: each answer is that of the same request alone, and nobody pays for the others' manners."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from eellm.serving import gate, server
from tests.serving.service import PROMPTS, Loaded, Service, said, sampled, service

MODES = ("catch_up", "full", "kv_recompute", "self_speculative")


def connection(running: Service) -> socket.socket:
    where = urlsplit(running.url)
    return socket.create_connection((where.hostname, where.port), timeout=30)


def test_each_answer_is_as_alone(served: Service, model: Loaded) -> None:
    """All modes, thresholds and ways of sampling at a time, more of them than slots."""
    asked = []
    for number in range(28):
        mode, threshold = MODES[number % 4], (0.3, 0.5, 0.8)[number % 3]
        temperature = 0.8 if number % 2 and mode in ("catch_up", "full") else 0.0
        asked.append((PROMPTS[number % len(PROMPTS)], 6 + number % 11, mode, threshold, temperature, number))

    def ask(one: tuple) -> dict:
        prompt, tokens, mode, threshold, temperature, seed = one
        extension = {} if mode == "full" else {"exit_threshold": threshold}
        answer = served.post(prompt=prompt, max_tokens=tokens, decoding=mode, temperature=temperature, seed=seed, **extension)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    with ThreadPoolExecutor(28) as pool:
        answers = list(pool.map(ask, asked))
    for (prompt, tokens, mode, threshold, temperature, seed), choice in zip(asked, answers, strict=True):
        alone = model.alone(prompt, tokens, mode, threshold, sampling=sampled(temperature), seed=seed)
        assert (choice["text"], said(choice)) == (alone.text, alone.said()), (prompt, mode)
    figures = httpx.get(served.url + "/metrics").text
    assert "eellm_queue_length 0.0" in figures
    assert 'eellm_exits_total{head="exit_06"}' in figures
    assert "eellm_time_to_first_token_seconds_bucket" in figures


def test_a_client_has_so_many_connections(model: Loaded, tmp_path: Path) -> None:
    with service(model, tmp_path / "run", "serve.max_connections=3", "serve.decodings=[catch_up]") as running:
        idle = [connection(running) for _ in range(2)]
        assert running.post(prompt="x", max_tokens=2).status_code == 200
        idle.append(connection(running))
        beyond = connection(running)
        assert beyond.recv(1) == b"", "closed at once"
        for one in idle:
            one.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                assert running.post(prompt="x", max_tokens=2).status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_a_full_queue_refuses_and_says_when_to_come_again(model: Loaded, tmp_path: Path) -> None:
    limits = ("decoding.max_batch=1", "serve.max_queue=2", "serve.max_choices=3", "serve.decodings=[catch_up]")
    with service(model, tmp_path / "run", *limits) as running, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(running.post, prompt=PROMPTS[0], max_tokens=200) for _ in range(3)]
        running.wait_for(lambda load: load["queued"] == 2)
        refused = running.post(prompt=PROMPTS[0])
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        answers = [future.result() for future in asked]
        assert [answer.status_code for answer in answers] == [200] * 3
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        assert running.post(prompt=PROMPTS[0], max_tokens=1).status_code == 200, "there is room again"


def test_a_request_has_its_time_and_no_more(model: Loaded, tmp_path: Path) -> None:
    limits = ("decoding.max_batch=1", "serve.request_timeout=0.3", "serve.decodings=[catch_up]")
    with service(model, tmp_path / "run", *limits) as running:
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: running.post(prompt=PROMPTS[0], max_tokens=240, n=4), range(4)))
        assert time.monotonic() - began < 5
        late = [answer for answer in answers if answer.status_code != 200]
        assert late, "960 tokens a request do not come in 0.3 s"
        assert {(answer.status_code, answer.json()["error"]["code"]) for answer in late} == {(504, "timeout")}
        assert {answer.headers["x-should-retry"] for answer in late} == {"false"}
        streamed = running.post(prompt=PROMPTS[0], max_tokens=240, n=8, stream=True).text.strip().split("\n\n")
        assert '"code": "timeout"' in streamed[-1]
        running.wait_for(lambda load: load["running"] == load["queued"] == 0)
        assert running.post(prompt=PROMPTS[0], max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_leaves_the_slot(stream: bool, model: Loaded, tmp_path: Path) -> None:
    with service(model, tmp_path / "run", "decoding.max_batch=1", "serve.decodings=[catch_up]") as running:
        body = b'{"prompt": "x = ", "max_tokens": 250, "n": 16%s}' % (b', "stream": true' if stream else b"")
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        with connection(running) as client:
            client.sendall(head + body)
            running.wait_for(lambda load: load["running"] == 1 and load["queued"] == 15)
            if stream:
                assert client.recv(100).startswith(b"HTTP/1.1 200")
        running.wait_for(lambda load: load["running"] == load["queued"] == 0, seconds=3)
        assert running.post(prompt="x = ", max_tokens=2).status_code == 200
    outcomes = [(line["outcome"], line["completion_tokens"] < 16 * 250) for line in running.log() if "outcome" in line]
    assert outcomes == [("client left", True), ("done", True)]


def test_one_client_cannot_take_all_slots_of_others(model: Loaded, tmp_path: Path) -> None:
    """Two addresses of this machine: the second is served before the first one's queue is done."""
    with (
        service(model, tmp_path / "run", "decoding.max_batch=1", "serve.decodings=[catch_up]") as running,
        ThreadPoolExecutor(1) as pool,
    ):
        greedy = pool.submit(running.post, prompt=PROMPTS[0], max_tokens=60, n=16)
        running.wait_for(lambda load: load["queued"] > 10)
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as other:
            answer = other.post(running.url + "/v1/completions", json={"prompt": PROMPTS[1], "max_tokens": 4})
        assert answer.status_code == 200
        assert not greedy.done()
        assert greedy.result().status_code == 200


def test_slow_and_oversized_clients_disturb_nobody(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(server, "HEAD_SECONDS", 1.0)
    with connection(served) as reader, connection(served) as writer, connection(served) as silent, connection(served) as huge:
        body = b'{"prompt": "x = ", "max_tokens": 250, "stream": true}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        reader.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)  # and reads nothing
        writer.sendall(head + b"Content-Length: 1000\r\n\r\n{")  # and sends no more
        silent.sendall(b"POST /v1/comple")
        huge.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        began = time.monotonic()
        assert served.post(prompt=PROMPTS[0], max_tokens=8).status_code == 200
        assert time.monotonic() - began < 5
        assert b"408" in writer.recv(100)
        assert silent.recv(100) == b""
        with pytest.raises(OSError):  # noqa: PT012, PT011  (sending goes on until the server hangs up)
            for _ in range(200):
                huge.sendall(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
    with connection(served) as announced:
        announced.sendall(head + b"Content-Length: 1000001\r\n\r\n")
        assert b"413" in announced.recv(100)
    served.wait_for(lambda load: load["running"] == load["queued"] == 0)
