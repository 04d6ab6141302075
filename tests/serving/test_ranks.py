"""Several ranks serve as one does; one that falls silent ends the service in time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import workers
from tests.serving.ranks import answers_of_ranks, failure_of_a_silent_rank
from tests.serving.service import PROMPTS, Loaded, said

LAYOUTS = {"tp2": ["parallel=tp2", "parallel.sequence_parallel=false"], "pp2": ["parallel=pp2", "decoding=pipeline"]}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_answer_as_one(layout: str, model: Loaded, tmp_path: Path) -> None:
    """Requests with thresholds of their own, at full depth, and with a stop string, which only rank 0 sees."""
    exiting = "catch_up" if layout == "tp2" else "pipeline"
    asked = [
        {
            "prompt": prompt,
            "max_tokens": 8 + number,
            "exit_threshold": (0.3, 0.5, 0.8)[number % 3],
            "stop": ["self"],
            "logprobs": 2,
        }
        for number, prompt in enumerate(PROMPTS)
    ]
    asked += [
        {"prompt": PROMPTS[0], "max_tokens": 9, "decoding": "full"},
        {"prompt": PROMPTS[1], "max_tokens": 9, "decoding": exiting},
    ]
    answers = workers.run(2, answers_of_ranks, [*LAYOUTS[layout], "decoding.max_batch=3"], tmp_path, asked)[0]
    for body, answer in zip(asked, answers, strict=True):
        (choice,) = answer["choices"]
        mode, threshold = ("full" if body.get("decoding") == "full" else "catch_up"), body.get("exit_threshold", 0.8)
        alone = model.alone(body["prompt"], body["max_tokens"], mode, threshold, stop=body.get("stop", []))
        assert choice["text"] == alone.text
        assert said(choice) == alone.said()[: len(choice["tokens"])]
        if "logprobs" in body:
            assert all(len(others) == 2 for others in choice["logprobs"]["top_logprobs"])
    assert len({layer for answer in answers for _, layer in said(answer["choices"][0])}) > 2


@pytest.mark.dist
def test_a_silent_stage_ends_the_service(tmp_path: Path) -> None:
    """Of tensor-parallel ranks, one that stands still is among `test_ending`'s."""
    overrides = [*LAYOUTS["pp2"], "serve.rank_timeout=4"]
    kind, status, seconds = workers.run(2, failure_of_a_silent_rank, overrides, tmp_path, 9.0)[0]
    assert kind, "the service has failed"
    assert status == 500, "and has said so to who waited"
    assert seconds < 25
