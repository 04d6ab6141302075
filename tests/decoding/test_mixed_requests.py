"""Requests with exits and thresholds of their own share a batch; alternatives come with a token where they are asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eellm.decoding.continuation import Request, Token
from eellm.decoding.decoder import DecoderOptions
from eellm.decoding.policy import never_exit
from eellm.decoding.sampling import SamplingOptions
from tests import workers
from tests.decoding.batches import Batch, decode_batches
from tests.decoding.models import BLOCKS, spec
from tests.decoding.models import policy as policy_of
from tests.decoding.pipelines import Cut, Work, serve

SPEC = spec(exits=BLOCKS)
PROMPTS = [(5, 17, 3), (22,), (8, 1, 30, 2, 9), (6, 6), (4, 9), (1, 2, 3)]


def policies(kind: str, thresholds: tuple[float, ...]) -> list:
    """One for each prompt: the decoder's exits, some of them, or none, at different thresholds."""
    low, middle, high = thresholds
    return [
        policy_of(SPEC, kind, low),
        policy_of(SPEC, kind, high),
        policy_of(SPEC, kind, middle, active=(2,)),
        never_exit(SPEC),
        policy_of(SPEC, kind, (high, low), active=(1, 4)),
        policy_of(SPEC, kind, low, least=4),
    ]


def requests(kind: str, thresholds: tuple[float, ...]) -> list[tuple[tuple[int, ...], Request]]:
    samplings = [
        SamplingOptions(),
        SamplingOptions(0.9),
        SamplingOptions(1.2, 7),
        SamplingOptions(),
        SamplingOptions(),
        SamplingOptions(),
    ]
    chosen = policies(kind, thresholds)
    return [
        (prompt, Request(10, sampling, seed=number, policy=policy, alternatives=number))
        for number, (prompt, sampling, policy) in enumerate(zip(PROMPTS, samplings, chosen, strict=True))
    ]


def said(tokens: list[Token]) -> list[tuple]:
    return [(token.id, token.head, tuple(id_ for id_, _ in token.alternatives)) for token in tokens]


@pytest.mark.parametrize(
    ("kind", "thresholds", "options"),
    [
        ("max_probability", (0.2, 0.4, 0.6), {}),
        ("max_probability", (0.2, 0.4, 0.6), {"mode": "kv_recompute", "max_pending": 3}),
        ("entropy", (0.8, 0.5, 0.3), {}),
        ("patience", (1, 2, 2), {}),
        ("max_probability", (0.1, 0.4, 0.6), {"mode": "self_speculative", "draft_length": 3}),
    ],
)
def test_each_request_is_as_alone_with_its_policy(kind: str, thresholds: tuple[float, ...], options: dict) -> None:
    """The oracle is a decoder made for one policy, which serves the request alone."""
    asked = requests(kind, thresholds)
    if options.get("mode") == "self_speculative":  # what is sampled depends on drafts, and these on the decoder's exits
        asked = [(prompt, replace(request, sampling=SamplingOptions())) for prompt, request in asked]
    together = Batch(SPEC, policy_of(SPEC, kind, 0.5), DecoderOptions(**options, max_batch=4), asked, [0, 0, 1, 2, 2, 3])
    alone = [
        Batch(SPEC, request.policy, DecoderOptions(**options), [(prompt, replace(request, policy=None))])
        for prompt, request in asked
    ]
    batch, *singles = workers.run(1, decode_batches, [together, *alone])[0]
    heads = set()
    for found, single in zip(batch.tokens, singles, strict=True):
        assert said(found) == said(single.tokens[0])
        heads |= {token.head for token in found} | {token.drafted_by for token in found}
    assert len(heads) > 2, "the exits were used"
    assert all(token.head == "final" for token in batch.tokens[3]), "the request without exits"


def test_the_same_over_tensor_parallel_ranks_and_stages() -> None:
    asked = requests("max_probability", (0.2, 0.4, 0.6))
    batch = Batch(SPEC, policy_of(SPEC, "max_probability", 0.5), DecoderOptions(max_batch=3), asked)
    (single,) = workers.run(1, decode_batches, [batch])[0]
    for (found,) in workers.run(2, decode_batches, [replace(batch, tp=2)]):
        assert [said(tokens) for tokens in found.tokens] == [said(tokens) for tokens in single.tokens]
    work = Work(batch.policy, asked, DecoderOptions("pipeline", max_batch=3), [0, 0, 0, 1, 2, 2])
    ((first,), _) = workers.run(2, serve, SPEC, Cut(2), [work])
    assert [said(tokens) for tokens in first.tokens] == [said(tokens) for tokens in single.tokens]


def test_alternatives_are_the_most_probable_tokens_and_the_token_among_them() -> None:
    asked = [(PROMPTS[0], Request(8, alternatives=SPEC.vocab_size)), (PROMPTS[1], Request(8, alternatives=3))]
    (served,) = workers.run(1, decode_batches, [Batch(SPEC, policy_of(SPEC, "max_probability", 0.3), DecoderOptions(), asked)])[0]
    for token in served.tokens[0]:
        shares = torch.tensor([logprob for _, logprob in token.alternatives]).exp()
        assert {id_ for id_, _ in token.alternatives} == set(range(SPEC.vocab_size))
        assert float(shares.sum()) == pytest.approx(1, abs=1e-4)
        assert shares.tolist() == sorted(shares.tolist(), reverse=True)
        assert token.alternatives[0] == (token.id, pytest.approx(token.logprob, abs=1e-5)), "greedy takes the first"
    assert {len(token.alternatives) for token in served.tokens[1]} == {3}
