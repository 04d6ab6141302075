"""Two tensor-parallel ranks emit the tokens of one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eellm.decoding.continuation import Request
from eellm.decoding.decoder import DecoderOptions
from eellm.decoding.policy import never_exit
from eellm.decoding.sampling import SamplingOptions
from tests import workers
from tests.decoding.batches import Batch, decode_batches
from tests.decoding.models import BLOCKS, Job, decode_all, policy, spec
from tests.engine.test_parity import VARIANTS

SAMPLINGS = [SamplingOptions(*options) for options in ((0.0,), (0.8,), (1.0, 5), (1.5, 0, 0.9), (2.0, 40, 0.9))]


@pytest.mark.parametrize(("family", "vocabulary"), [("llama", 31), ("gpt2", 33), ("olmo2", 61)])
def test_two_ranks_are_as_one(family: str, vocabulary: int) -> None:
    """All policies, sampled all ways; the second rank holds none, one or many of the vocabulary's real rows."""
    changes = ({"exits": BLOCKS} if family == "llama" else {}) | VARIANTS.get(family, {})
    spec_ = spec(vocab_size=vocabulary, **changes)
    prompt = (5, 17, 3, 22, 8)
    jobs = [
        Job(spec_, policy(spec_, "max_probability", 0.4), Request(16, sampling, seed=3), DecoderOptions(max_pending=5), prompt)
        for sampling in SAMPLINGS
    ]
    jobs += [replace(jobs[0], policy=policy(spec_, kind, 0.5)) for kind in ("margin", "entropy")]
    jobs += [replace(jobs[1], policy=never_exit(spec_))]
    single = workers.run(1, decode_all, jobs)[0]
    ranks = workers.run(2, decode_all, [replace(job, tp=2) for job in jobs])
    spoken = set()
    for outcomes in zip(single, *ranks, strict=True):
        alone = outcomes[0].tokens
        spoken |= {token.head for token in alone}
        assert all(token.id < vocabulary for token in alone)
        for outcome in outcomes[1:]:
            assert [(token.id, token.head) for token in outcome.tokens] == [(token.id, token.head) for token in alone]
            for token, wanted in zip(outcome.tokens, alone, strict=True):
                assert token.confidence == pytest.approx(wanted.confidence, abs=1e-4)
                assert token.logprob == pytest.approx(wanted.logprob, abs=1e-3)
    assert len(spoken) >= 2


def test_ids_beyond_two_bytes() -> None:
    """An odd vocabulary of 70,001 entries, greedy and sampled; the ids come out of float32 and int64 exchanges whole."""
    spec_ = spec(vocab_size=70_001, padded_vocab_size=70_016, num_layers=2, exits=())
    samplings = (SamplingOptions(), SamplingOptions(1.0), SamplingOptions(1.0, 50), SamplingOptions(1.0, 0, 0.9))
    jobs = [Job(spec_, never_exit(spec_), Request(8, sampling, seed=1), prompt=(5, 69_999, 32_001)) for sampling in samplings]
    single = workers.run(1, decode_all, jobs)[0]
    ranks = workers.run(2, decode_all, [replace(job, tp=2) for job in jobs])
    ids = [[token.id for token in outcome.tokens] for outcome in single]
    assert all([[token.id for token in outcome.tokens] for outcome in rank] == ids for rank in ranks)
    assert max(map(max, ids)) > 65_535
    assert all(0 <= id_ < 70_001 for sequence in ids for id_ in sequence)


@pytest.mark.parametrize("options", [{"mode": "kv_recompute", "max_pending": 3}, {"mode": "self_speculative", "draft_length": 3}])
def test_batches_on_two_ranks(options: dict) -> None:
    """Greedy and sampled requests that come and go; rejected drafts leave on both ranks."""
    spec_ = spec(exits=BLOCKS, vocab_size=33)
    prompts = [(5, 17, 3), (22,), (8, 1, 30, 2, 9), (6, 6)]
    requests = [(prompt, Request(9, SAMPLINGS[number], seed=number)) for number, prompt in enumerate(prompts)]
    batch = Batch(spec_, policy(spec_, "max_probability", 0.3), DecoderOptions(**options, max_batch=3), requests, [0, 0, 1, 2])
    (single,) = workers.run(1, decode_batches, [batch])[0]
    for (found,) in workers.run(2, decode_batches, [replace(batch, tp=2)]):
        for own, exact in zip(found.tokens, single.tokens, strict=True):
            assert [(token.id, token.head) for token in own] == [(token.id, token.head) for token in exact]
        assert (found.steps.drafted, found.steps.accepted) == (single.steps.drafted, single.steps.accepted)
    assert (single.steps.drafted > single.steps.accepted) == (options["mode"] == "self_speculative")
