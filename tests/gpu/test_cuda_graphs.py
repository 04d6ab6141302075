"""Real CUDA graphs give the tokens of eager decoding."""

from __future__ import annotations

import pytest
import torch

from eellm.decoding.continuation import Request, Token
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.model.cuda_graphs import SegmentGraphs
from eellm.model.stage import Stage
from tests.decoding.models import policy, spec
from tests.decoding.test_cuda_graphs import FAMILIES, PROMPTS
from tests.gpu.stages import stage_on

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def serve(stage: Stage, max_batch: int, graphs: bool) -> list[list[Token]]:
    chosen = policy(stage.spec, "max_probability", 0.45)
    decoder = Decoder(stage, chosen, DecoderOptions("catch_up", max_pending=3, max_batch=max_batch))
    assert decoder.runner.graphs is not None, "graphs are used where there is CUDA"
    decoder.runner.graphs = SegmentGraphs(decoder.model, least_keys=4) if graphs else None
    sequences = [decoder.submit(prompt, Request(20 - number)) for number, prompt in enumerate(PROMPTS)]
    while decoder.step():
        pass
    return [sequence.tokens for sequence in sequences]


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_are_eager_steps(family: str, max_batch: int) -> None:
    with stage_on(torch.device("cuda", 0), spec(**FAMILIES[family]), "fp32") as stage:
        eager, captured = (serve(stage, max_batch, graphs) for graphs in (False, True))
    for own, exact in zip(captured, eager, strict=True):
        assert [(token.id, token.head) for token in own] == [(token.id, token.head) for token in exact]
        for token, wanted in zip(own, exact, strict=True):
            assert token.logprob == pytest.approx(wanted.logprob, abs=1e-3)
