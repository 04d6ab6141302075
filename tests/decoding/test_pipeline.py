"""Pipelined decoding against sequential catch-up decoding on one rank: the same tokens, the same keys and values."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eellm.config.schema import DecodingConfig
from eellm.decoding.continuation import Request, Token
from eellm.decoding.decoder import DecoderOptions
from eellm.decoding.model.ragged import Span
from eellm.decoding.pipeline.links import MAX_IN_FLIGHT
from eellm.decoding.pipeline.messages import Kind, Message, Passenger, State, WireFormat
from eellm.decoding.policy import never_exit
from eellm.decoding.sampling import SamplingOptions
from eellm.model.spec import ExitSpec, ModelSpec
from tests import workers
from tests.decoding import oracle
from tests.decoding.models import BLOCKS, MIXED_HEADS, policy, spec
from tests.decoding.pipelines import PIPELINED, Cut, Result, Work, interrupted, run_ahead, serve, texts
from tests.decoding.test_admission import random_requests
from tests.decoding.test_generation import config, text_spec
from tests.decoding.test_modes import PROMPTS
from tests.decoding.test_modes import check as check_tokens

SAMPLINGS = [SamplingOptions(*options) for options in ((0.0,), (0.8,), (1.0, 5), (1.3, 0, 0.9))]
SIX_LAYERS = (ExitSpec(1, "block"), ExitSpec(2), ExitSpec(4, "mlp", tie_output=False), ExitSpec(5, "block"))
CUTS = {
    "pp2": (Cut(2), MIXED_HEADS),
    "pp2, a stage that begins with a block exit": (Cut(2, boundary="start"), BLOCKS),
    "pp2, exits on one stage": (Cut(2, layers_per_stage=(3, 1)), MIXED_HEADS),
    "pp4": (Cut(4), MIXED_HEADS),
    "pp4, uneven, a block on either side of a boundary": (Cut(4, layers_per_stage=(1, 3, 1, 1), boundary="start"), SIX_LAYERS),
    "tp2 x pp2": (Cut(2, tp=2), MIXED_HEADS),
    "tp2 x pp2, a stage that begins with an exit": (Cut(2, tp=2, boundary="start"), BLOCKS),
}


def works(spec_: ModelSpec, eos: dict[int, int]) -> list[Work]:
    """All at once; a stream of sampled requests, some with a token that ends them; and every policy."""
    count = len(spec_.exits)
    at_once = [(prompt, Request(10)) for prompt in PROMPTS[:5]]
    stream = [
        (prompt, Request(3 + number, SAMPLINGS[number % 4], number, eos_id=eos.get(number)))
        for number, prompt in enumerate(PROMPTS)
    ]
    falling = policy(spec_, "max_probability", (0.7, 0.4, 0.3, 0.3)[:count])
    found = [
        Work(falling, at_once, replace(PIPELINED, max_batch=5)),
        Work(replace(falling, min_new_tokens=2), stream, replace(PIPELINED, max_batch=3), [0, 0, 0, 1, 2, 2, 9, 30]),
        Work(falling, stream, replace(PIPELINED, max_batch=3, prefill_chunk=4), [0, 0, 0, 1, 2, 2, 9, 30]),
        Work(policy(spec_, "patience", 2.0), at_once[:2]),
        Work(never_exit(spec_), at_once[:3], replace(PIPELINED, mode="full", max_batch=2)),
    ]
    found += [Work(policy(spec_, kind, 0.5), at_once[:1]) for kind in ("margin", "entropy")]
    return found + [Work(policy(spec_, "fixed_layer", 0.0, (exit_.layer,)), at_once[1:2]) for exit_ in spec_.exits]


@pytest.mark.parametrize("name", CUTS)
def test_pipeline_is_sequential(name: str) -> None:
    cut, exits = CUTS[name]
    spec_ = spec(exits=exits, num_layers=6 if exits is SIX_LAYERS else 4)
    (stream,) = workers.run(1, serve, spec_, Cut(), [works(spec_, {})[1].sequential()])[0]
    jobs = works(spec_, {number: stream.tokens[number][number // 2].id for number in (0, 3, 6)})
    sequential = workers.run(1, serve, spec_, Cut(), [job.sequential() for job in jobs])[0]
    ranks = workers.run(cut.pp * cut.tp, serve, spec_, cut, jobs)
    for first in ranks[: cut.tp]:
        for own, exact in zip(first, sequential, strict=True):
            assert own.ends == exact.ends
            compare(own.tokens, exact.tokens)
    stages = [[rank[number] for rank in ranks] for number in range(len(jobs))]
    for found, exact in zip(stages, sequential, strict=True):
        # heads are evaluated where, and only where, sequential decoding evaluates them
        for part in ("prefill", "steps"):
            heads = sum((getattr(result, part).heads for result in found[:: cut.tp]), Counter())
            assert heads == getattr(exact, part).heads
    check_kv(stages[0], sequential[0], cut.tp)
    spoken = {token.head for result in sequential for tokens in result.tokens for token in tokens}
    assert spoken == set(spec_.heads)
    assert sequential[1].ends[3] == sequential[1].ends[6] == "eos"


def compare(found: list[list[Token]], exact: list[list[Token]]) -> None:
    for own, wanted in zip(found, exact, strict=True):
        assert [(token.id, token.head, token.exit_layer) for token in own] == [
            (token.id, token.head, token.exit_layer) for token in wanted
        ]
        for token, other in zip(own, wanted, strict=True):
            assert token.confidence == pytest.approx(other.confidence, abs=1e-4)
            assert token.logprob == pytest.approx(other.logprob, abs=1e-3)


def check_kv(found: list[Result], exact: Result, tp: int) -> None:
    """Every layer's keys and values, put together from all ranks, are those of one rank; no layer is on two stages."""
    together: dict = {}
    for stage in range(0, len(found), tp):
        columns = [result.kv for result in found[stage : stage + tp]]
        assert not together.keys() & columns[0].keys()
        together |= {
            place: [np.concatenate(parts, axis=1) for parts in zip(*(kv[place] for kv in columns), strict=True)]
            for place in columns[0]
        }
    assert together.keys() == exact.kv.keys()
    for place, parts in exact.kv.items():
        assert parts[0].shape[0] >= 10, place
        for own, wanted in zip(together[place], parts, strict=True):
            np.testing.assert_allclose(own, wanted, rtol=2e-4, atol=2e-4, err_msg=str(place))


def test_each_request_is_served_as_if_alone() -> None:
    """Requests of all kinds that come and go, against the same ones one after the other on one rank."""
    spec_, count = spec(exits=BLOCKS, vocab_size=31), 60
    requests = random_requests(count, seed=5)
    arrivals = sorted(random.Random(5).randrange(count) for _ in range(count))
    chosen = policy(spec_, "max_probability", (0.7, 0.4, 0.3), least=1)
    work = Work(chosen, requests, replace(PIPELINED, max_batch=7), arrivals)
    alone = replace(work, options=DecoderOptions(), arrivals=[])
    (exact,) = workers.run(1, serve, spec_, Cut(), [alone])[0]
    ((found,), _) = workers.run(2, serve, spec_, Cut(2), [work])
    assert found.ends == exact.ends
    assert {"eos", "length"} <= set(found.ends)
    compare(found.tokens, exact.tokens)
    assert {token.head for tokens in found.tokens for token in tokens} == set(spec_.heads)


def test_a_threshold_out_of_reach_is_the_plain_model() -> None:
    """At any batch size: exits are asked on every stage, none is trusted."""
    spec_ = spec()
    never = policy(spec_, "max_probability", 1.5)
    works = [Work(never, [(prompt, Request(12)) for prompt in PROMPTS], replace(PIPELINED, max_batch=size)) for size in (1, 3, 8)]
    for found in workers.run(2, serve, spec_, Cut(2), works)[0]:
        assert check_tokens(spec_, found.tokens, oracle.Rule("never")) == {"final": 12 * len(PROMPTS)}


def test_every_row_passes_every_layer_once() -> None:
    """On each stage, whoever has emitted: its layers times the tokens that entered, the last one of each sequence never does."""
    spec_ = spec(exits=(ExitSpec(1), ExitSpec(2)))
    work = Work(policy(spec_, "max_probability", 0.4), [(prompt, Request(10)) for prompt in PROMPTS[:5]])
    ranks = workers.run(2, serve, spec_, Cut(2, layers_per_stage=(3, 1)), [work])
    for (result,), layers in zip(ranks, (3, 1), strict=True):
        assert result.prefill.layer_rows == layers * sum(map(len, PROMPTS[:5]))
        assert result.steps.layer_rows == layers * 5 * 9
    first, second = (result.steps for (result,) in ranks)
    assert (first.tokens, second.tokens) == (45, 0)
    assert 0 < second.heads["final"] < 45, "some tokens left early"


def test_a_batch_at_full_depth_fills_the_stages() -> None:
    """Four sequences over two stages go in two groups, so that both stages are at work; the tokens stay what they are."""
    spec_ = spec()
    options = DecoderOptions("full", max_batch=4)
    work = Work(never_exit(spec_), [(prompt, Request(10)) for prompt in PROMPTS[:4]], options)
    sequential = workers.run(1, serve, spec_, Cut(), [work.sequential()])[0][0]
    ((first,), (second,)) = workers.run(2, serve, spec_, Cut(2), [work])
    compare(first.tokens, sequential.tokens)
    assert first.steps.rows == second.steps.rows == {2: 2 * 9}
    assert sequential.steps.rows == {4: 9}


def test_the_first_stage_runs_ahead_up_to_the_bound(tmp_path: Path) -> None:
    """Its exit emits without the second stage, which is held back; and does wait where too much is under way.

    A message is on its way until the receiver asks for it, so what is counted is never more than what the bound counts.
    """
    spec_ = spec()
    found = workers.run(2, run_ahead, spec_, policy(spec_, "fixed_layer", 0.0, (1,)), tmp_path, MAX_IN_FLIGHT + 12)[0]
    assert found[:MAX_IN_FLIGHT] == list(range(1, MAX_IN_FLIGHT + 1))
    assert max(found) == MAX_IN_FLIGHT


def test_a_token_on_its_way_to_nobody() -> None:
    """Requests that end from outside get nothing more, and those that take their slots are served as if alone."""
    spec_ = spec()
    requests = [(prompt, Request(40, SAMPLINGS[1], seed)) for seed, prompt in enumerate(PROMPTS[:3])] + [
        (PROMPTS[4], Request(12))
    ]
    chosen = policy(spec_, "max_probability", (0.6, 0.5, 0.3))
    alone = workers.run(1, serve, spec_, Cut(), [Work(chosen, requests).sequential()])[0][0]
    found = workers.run(2, interrupted, spec_, chosen, requests)[0]
    compare(found, [tokens[: len(own)] for own, tokens in zip(found, alone.tokens, strict=True)])
    assert len(found[-1]) == 12


def test_texts_end_at_stop_strings() -> None:
    """Prompts of the command line over two stages: the texts, and why they end, are those of one rank."""
    spec_ = text_spec()
    chosen = policy(spec_, "max_probability", 0.3)
    wanted = config(mode="catch_up", prompts=["the cat", "", "a bat and", "the hat"], max_batch=2)
    (plain,) = workers.run(1, texts, spec_, Cut(), chosen, wanted)
    stop = plain[0].text[4:6]
    for stops in ([], [stop]):
        sequential: DecodingConfig = wanted.model_copy(update={"stop": stops})
        (one,) = workers.run(1, texts, spec_, Cut(), chosen, sequential)
        two = workers.run(2, texts, spec_, Cut(2), chosen, sequential.model_copy(update={"mode": "pipeline"}))[0]
        assert [(own.text, own.pieces, own.stop_reason) for own in two] == [
            (own.text, own.pieces, own.stop_reason) for own in one
        ]
        assert all(own.seconds > 0 for own in two)
        assert ("stop" in {own.stop_reason for own in two}) == bool(stops)


def test_a_cache_grows_on_all_stages() -> None:
    spec_ = spec()
    requests = [(PROMPTS[1], Request(3)), (PROMPTS[2], Request(9))]
    work = Work(policy(spec_, "max_probability", 0.4), requests, DecoderOptions("pipeline", max_batch=2), [0, 1])
    sequential = workers.run(1, serve, spec_, Cut(), [work.sequential()])[0][0]
    ((first,), _) = workers.run(2, serve, spec_, Cut(2), [work])
    compare(first.tokens, sequential.tokens)


def test_messages_and_answers_keep_every_bit() -> None:
    spec_ = spec()
    decoders = policy(spec_, "max_probability", (0.1, 1 / 3, 0.9))
    wire = WireFormat(spec_, max_batch=3, policy=decoders)
    fewer = policy(spec_, "max_probability", (0.7, 0.0), active=(decoders.active[0], decoders.active[2]))
    said = [(60.0, 0.1, 1 / 3, 2.7, -3.1), (7.0, 0.5, 0.25, 1e-30, 1e9)]
    passengers = [
        Passenger(Span(2, 1_000_003, 1), State.asks, 1 / 7, SamplingOptions(0.7, 40, 0.95), fewer, 7, said),
        Passenger(Span(0, 5, 17), State.decided, 0.0, SamplingOptions(), decoders),
    ]
    for message in (Message(Kind.step, passengers, 2048), Message(Kind.end)):
        assert wire.read_message(wire.write_message(message)) == message
    others = ((60, -1 / 3), (2**31, -1.5))
    tokens = [Token(60, "exit_02", 2, 0.3, -1 / 3, None, others), None, Token(2**31, "final", 4, 1.0, -0.0)]
    assert wire.read_answer(wire.write_answer(tokens), 3) == tokens
    assert wire.read_answer(wire.write_answer(tokens[:2]), 2) == tokens[:2]
