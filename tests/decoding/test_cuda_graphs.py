"""What graphs of decode steps give is what eager decoding gives, their kernels recorded and repeated on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from eellm.decoding.continuation import Request, Token
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.model.cuda_graphs import SegmentGraphs, bucket
from eellm.decoding.policy import Policy
from eellm.model.spec import ModelSpec
from eellm.model.stage import Stage
from tests import workers
from tests.decoding.models import BLOCKS, build, policy, spec
from tests.decoding.recorded_kernels import Recorder
from tests.engine.test_parity import VARIANTS

FAMILIES = {"llama": {}, "blocks": {"exits": BLOCKS}, **VARIANTS}
PROMPTS = [(5, 17, 3, 42, 8), (9,), (22, 1, 30), (7, 7), (11, 12, 13, 14, 15, 16, 17)]
COUNT = 20


@dataclass(frozen=True)
class Found:
    """Tokens of each request, and how many graphs were captured and replayed."""

    tokens: list[list[Token]]
    captured: int
    replayed: int


def serve(stage: Stage, policy_: Policy, options: DecoderOptions, recorder: Recorder | None) -> Found:
    """More requests than slots, of different lengths."""
    decoder = Decoder(stage, policy_, options)
    if recorder is not None:
        decoder.model.spare_places = 1  # as on CUDA
        decoder.runner.graphs = SegmentGraphs(decoder.model, recorder.capture, least_keys=4)
    sequences = [decoder.submit(prompt, Request(COUNT - 2 * number)) for number, prompt in enumerate(PROMPTS)]
    while decoder.step():
        pass
    counts = (0, 0) if recorder is None else (recorder.captured, recorder.replayed)
    return Found([sequence.tokens for sequence in sequences], *counts)


def eager_and_captured(rank: int, spec_: ModelSpec, options: DecoderOptions) -> tuple[Found, Found, int]:
    stage, chosen = build(spec_), policy(spec_, "max_probability", 0.45)
    segments = len(Decoder(stage, chosen).model.segments)
    return serve(stage, chosen, options, None), serve(stage, chosen, options, Recorder()), segments


@pytest.mark.parametrize("mode", ["kv_recompute", "self_speculative"])
def test_a_place_that_was_given_up_is_written_again(mode: str) -> None:
    """Rejected drafts and tokens that start over leave their places in the cache to later replays."""
    options = DecoderOptions(mode, max_pending=3, draft_length=3, max_batch=3)
    eager, captured, _ = workers.run(1, eager_and_captured, spec(init_std=0.3), options)[0]
    for own, exact in zip(captured.tokens, eager.tokens, strict=True):
        assert [(token.id, token.head, token.drafted_by) for token in own] == [
            (token.id, token.head, token.drafted_by) for token in exact
        ]
    assert captured.replayed > captured.captured > 0


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_are_eager_steps(family: str, max_batch: int) -> None:
    options = DecoderOptions("catch_up", max_pending=3, max_batch=max_batch)
    eager, captured, segments = workers.run(1, eager_and_captured, spec(**FAMILIES[family]), options)[0]
    for own, exact in zip(captured.tokens, eager.tokens, strict=True):
        assert [(token.id, token.head) for token in own] == [(token.id, token.head) for token in exact]
        for token, wanted in zip(own, exact, strict=True):
            assert token.logprob == pytest.approx(wanted.logprob, abs=2e-4)
    heads = {token.head for tokens in eager.tokens for token in tokens}
    assert len(heads) >= 2
    assert captured.replayed > 2 * captured.captured
    # 4, 8, 16 and at most 32 keys; 1, 2 and at most 3 slots
    assert segments <= captured.captured <= segments * 4 * (1 if max_batch == 1 else 3)


@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 4), (5, 8), (9, 16), (17, 20), (20, 20)])
def test_buckets(count: int, size: int) -> None:
    assert bucket(count, 4, 20) == size


def test_the_recorder_repeats_kernels_only() -> None:
    given, factor = torch.ones(3), [2.0]
    replay = Recorder().capture(lambda: (given * factor[0]).add_(1).view(3, 1))
    given.fill_(5.0)
    factor[0] = 100.0
    assert replay().tolist() == [[11.0], [11.0], [11.0]]
