"""Many clients at a server for a while, bad ones among them: is every answer that of the request alone, and when does it come?

    python -m tests.serving.load --clients 64 --seconds 60

Starts `python run.py task=serve`, asks a set of requests one by one first, and then lets clients repeat them at random beside
clients that send nonsense, too much or too slowly, or go away. Prints JSON; the exit status says whether all answers were right.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from tests.serving.service import PROMPTS
from tests.serving.test_ending import started

MODES = ("catch_up", "full", "kv_recompute", "self_speculative")


def requests() -> list[dict]:
    """Greedy and sampled, streamed and whole, in several modes."""
    asked = []
    for number in range(48):
        body = {
            "prompt": PROMPTS[number % len(PROMPTS)],
            "max_tokens": 4 + number % 21,
            "decoding": MODES[number % 4],
            "seed": number,
        }
        body |= {"temperature": 0.7 * (number % 3 == 0), "stream": number % 2 == 0}
        body |= {} if body["decoding"] == "full" else {"exit_threshold": (0.3, 0.5, 0.8)[number % 3]}
        asked.append(body)
    return asked


def told(answer: httpx.Response) -> tuple | None:
    """Text, token ids and layers of an answer; None where it was refused."""
    if answer.status_code != 200:
        return None
    if "event-stream" in answer.headers["content-type"]:
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert events[-1] == "[DONE]", events[-1]
        choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    else:
        choices = answer.json()["choices"]
    tokens = [token for choice in choices for token in choice["tokens"]]
    return "".join(choice["text"] for choice in choices), tuple((token["id"], token["exit_layer"]) for token in tokens)


def well_behaved(client: httpx.Client, asked: list[dict], alone: list[tuple], draw: random.Random, record: Record) -> None:
    number = draw.randrange(len(asked))
    began = time.monotonic()
    answer = client.post("/v1/completions", json=asked[number])
    record.seconds.append(time.monotonic() - began)
    record.count(f"status {answer.status_code}")
    found = told(answer)
    if found is not None and found != alone[number]:
        record.wrong.append((asked[number], found, alone[number]))


def badly_behaved(client: httpx.Client, draw: random.Random, record: Record) -> None:
    kind = draw.choice(("malformed", "oversized", "left", "slow reader", "half a body"))
    record.count(kind)
    body = {"prompt": "x = ", "max_tokens": 100, "stream": True}
    if kind == "malformed":
        bad = draw.choice((b"{", b'{"prompt": 5}', b"\xff", b'{"prompt": "x", "n": 1e9}', b'{"prompt": "x", "what": 1}'))
        assert client.post("/v1/completions", content=bad).status_code == 400
    elif kind == "oversized":
        with suppress(httpx.TransportError):  # it may hang up before all is sent
            assert client.post("/v1/completions", content=b"x" * 2_000_000).status_code == 413
    elif kind == "half a body":
        with suppress(httpx.TransportError):
            client.post("/v1/completions", content=_half_a_body(), timeout=2)
    else:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            for _ in answer.iter_lines():
                if kind == "left":
                    break
                time.sleep(0.2 if draw.random() < 0.1 else 0)


def _half_a_body() -> Iterator[bytes]:
    yield b"{"
    time.sleep(1.0)
    raise httpx.WriteError("went away")


class Record:
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.wrong: list[tuple] = []
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def run(clients: int, seconds: float) -> dict:
    asked, record = requests(), Record()
    with tempfile.TemporaryDirectory() as folder, started(Path(folder) / "run", "decoding.draft_length=3") as (process, url):
        with httpx.Client(base_url=url, timeout=60) as client:
            alone = [told(client.post("/v1/completions", json=body)) for body in asked]
        server, end = psutil.Process(process.pid), time.monotonic() + seconds
        memory = [server.memory_info().rss]

        def work(number: int) -> None:
            draw = random.Random(number)
            with httpx.Client(base_url=url, timeout=60) as client:
                while time.monotonic() < end:
                    try:
                        if number % 4:
                            well_behaved(client, asked, alone, draw, record)
                        else:
                            badly_behaved(client, draw, record)
                    except Exception as error:
                        record.faults[f"{type(error).__name__}: {error}"] += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            memory.append(server.memory_info().rss)
        load = httpx.get(url + "/health").json()
    ordered = sorted(record.seconds)
    return {
        "clients": clients,
        "seconds": seconds,
        "answers": len(ordered),
        "wrong": len(record.wrong),
        "p50_seconds": round(statistics.median(ordered), 3),
        "p95_seconds": round(ordered[int(0.95 * len(ordered))], 3),
        "memory_mb": {
            "start": memory[0] // 10**6,
            "a third": memory[len(memory) // 3] // 10**6,
            "end": memory[-1] // 10**6,
        },
        "counts": dict(record.counts),
        "faults": dict(record.faults),
        "left behind": load,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    figures = run(**vars(parser.parse_args()))
    print(json.dumps(figures, indent=2))
    sys.exit(bool(figures["wrong"] or figures["faults"]))
