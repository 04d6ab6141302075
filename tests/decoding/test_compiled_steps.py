"""Compiled steps give what eager ones give; a real compilation, so there is a C++ compiler or the test is not run."""

from __future__ import annotations

import shutil

import pytest

from eellm.decoding.continuation import Request, Token
from eellm.decoding.decoder import Decoder, DecoderOptions
from tests import workers
from tests.decoding.models import build, policy, spec

PROMPTS = [(5, 17, 3, 42, 8), (9,)]
COUNT = 10


def tokens(rank: int, compile_: bool) -> tuple[list[list[Token]], int]:
    """Of one request after the other; and how many steps were captured."""
    spec_ = spec()
    options = DecoderOptions("catch_up", max_pending=3, max_tokens=16, compile=compile_)
    decoder = Decoder(build(spec_), policy(spec_, "max_probability", 0.45), options)
    sequences = [decoder.submit(prompt, Request(COUNT)) for prompt in PROMPTS]
    while decoder.step():
        pass
    graphs = decoder.runner.graphs
    return [sequence.tokens for sequence in sequences], 0 if graphs is None else graphs.captured


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile with")
def test_compiled_steps_are_eager_steps() -> None:
    (eager, none), (compiled, captured) = (workers.run(1, tokens, compile_)[0] for compile_ in (False, True))
    assert none == 0
    assert captured == 4  # segments
    for own, exact in zip(compiled, eager, strict=True):
        assert [(token.id, token.head) for token in own] == [(token.id, token.head) for token in exact]
        for token, wanted in zip(own, exact, strict=True):
            assert token.logprob == pytest.approx(wanted.logprob, abs=2e-4)
    assert len({token.head for sequence in eager for token in sequence}) >= 2
