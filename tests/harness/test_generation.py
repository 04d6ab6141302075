"""What the harness gets to read is our own generation."""

from __future__ import annotations

import pytest

from eellm.decoding.policy import never_exit
from tests import workers
from tests.decoding.models import policy, spec
from tests.harness.answers import Job, answers, decoding, generated, setting

SPEC = spec()
SETTINGS = [
    setting(never_exit(SPEC), mode="full"),
    setting(policy(SPEC, "max_probability", 0.5)),
    setting(policy(SPEC, "max_probability", 0.5), mode="self_speculative", draft_length=3),
]
PROMPTS = ["def main(", "import os", "x", "a prompt of some length", ""]
OPTIONS = {
    "greedy": ({"until": [], "max_gen_toks": 12}, {"max_new_tokens": 12}),
    "stops": ({"until": ["e", "\n"], "max_gen_toks": 20, "do_sample": False}, {"max_new_tokens": 20, "stop": ["e", "\n"]}),
    "sampled": (
        {"until": "Q", "max_new_tokens": 10, "do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.9},
        {"max_new_tokens": 10, "stop": ["Q"], "temperature": 0.8, "top_k": 9, "top_p": 0.9},
    ),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_batch_of_requests_is_answered_by_what_each_prompt_generates_alone(kind: str) -> None:
    given, ours = OPTIONS[kind]
    job = Job(SPEC, SETTINGS, "generate_until", [(prompt, given) for prompt in PROMPTS], max_batch=3)
    wanted = workers.run(1, generated, job, PROMPTS, decoding(**ours))[0]
    for (texts, usage), expected in zip(workers.run(1, answers, job)[0], wanted, strict=True):
        assert texts == [generation.text for generation in expected]
        tokens = [token for generation in expected for token in generation.tokens]
        assert usage.generated.tokens == len(tokens)
        assert usage.layers == sum(token.exit_layer for token in tokens)
        assert usage.generated.seconds > 0
        assert usage.scored.tokens == usage.scored.seconds == 0
    if kind == "greedy":
        assert wanted[1] != wanted[0], "otherwise no exit has spoken"
        assert [one.text for one in wanted[2]] == [one.text for one in wanted[0]], "speculation is lossless"


def test_requests_with_different_options_keep_their_order() -> None:
    requests = [(prompt, {"until": [], "max_gen_toks": count}) for prompt, count in zip(PROMPTS, (3, 5, 3, 5, 4), strict=True)]
    job = Job(SPEC, SETTINGS[:1], "generate_until", requests)
    ((texts, usage),) = workers.run(1, answers, job)[0]
    for (prompt, options), text in zip(requests, texts, strict=True):
        new = decoding(max_new_tokens=options["max_gen_toks"])
        assert text == workers.run(1, generated, job, [prompt], new)[0][0][0].text
    assert usage.generated.tokens == 20


def test_a_long_prompt_loses_its_beginning() -> None:
    """New tokens take at most half of what the model reads."""
    job = Job(SPEC, SETTINGS[:1], "generate_until", [(PROMPTS[3], {"until": [], "max_gen_toks": 100})], longest=16)
    ((texts, usage),) = workers.run(1, answers, job)[0]
    (wanted,) = workers.run(1, generated, job, [PROMPTS[3][-9:]], decoding(max_new_tokens=8))[0][0]
    assert texts == [wanted.text]
    assert usage.cut == 1
