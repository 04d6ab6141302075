"""Text from prompts: stop strings, ends and the rows of generations.jsonl, with a real tokenizer and a model that exits."""

from __future__ import annotations

import functools
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from eellm.config.schema import DecodingConfig
from eellm.data.hugging_face_tokenizer import HuggingFaceTokenizer
from eellm.data.tokenizer import END_OF_DOCUMENT
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.generation import Generation, Stops, generate_texts
from eellm.model.spec import ModelSpec
from tests import workers
from tests.decoding.models import build, policy, spec

COUNT = 30


@functools.cache
def tokenizer() -> HuggingFaceTokenizer:
    """Bytes, the end of a document, and a few merges."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=265,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat and the hat and the bat"], trainer)
    return HuggingFaceTokenizer(backend)


def text_spec() -> ModelSpec:
    return spec(vocab_size=tokenizer().vocab_size, padded_vocab_size=272)


def config(**changes: object) -> DecodingConfig:
    values = {"mode": "catch_up", "prompts": [], "max_new_tokens": COUNT, "max_pending": None, "temperature": 1.0}
    values |= {"max_batch": 1, "max_tokens": None, "draft_length": "auto"}
    return DecodingConfig(**(values | {"top_k": 0, "top_p": 1.0, "stop": [], "stop_at_eos": True, "compile": False} | changes))


def generate(rank: int, calls: list[tuple[str, DecodingConfig, int | None]]) -> list[Generation]:
    """(prompt, config, token that ends documents or None for the tokenizer's) -> generations of one decoder."""
    spec_ = text_spec()
    decoder = Decoder(build(spec_), policy(spec_, "max_probability", 0.3), DecoderOptions())
    generations = []
    for prompt, config_, eos in calls:
        own = HuggingFaceTokenizer(tokenizer()._backend)
        own.eod_id = own.eod_id if eos is None else eos
        generations += generate_texts(decoder, own, [prompt], config_, seed=1)
    return generations


@pytest.fixture(scope="module")
def whole() -> Generation:
    return workers.run(1, generate, [("the cat", config(), None)])[0][0]


def test_pieces_make_the_text(whole: Generation) -> None:
    ids = [token.id for token in whole.tokens]
    assert whole.text == "".join(whole.pieces) == tokenizer().decode(ids)
    assert whole.pieces == tokenizer().pieces(ids)
    assert len(ids) == COUNT
    assert whole.stop_reason == "length"
    assert whole.seconds > 0


def test_row_of_generations_jsonl(whole: Generation) -> None:
    row = json.loads(json.dumps(whole.as_row()))
    assert (row["prompt"], row["text"], row["decoding"], row["threshold"]) == ("the cat", whole.text, "catch_up", 0.3)
    for told, piece, token in zip(row["tokens"], whole.pieces, whole.tokens, strict=True):
        assert told == {
            "text": piece,
            "id": token.id,
            "head": token.head,
            "exit_layer": token.exit_layer,
            "confidence": token.confidence,
            "logprob": token.logprob,
            "drafted_by": None,
        }
    assert {told["exit_layer"] for told in row["tokens"]} >= {4, 1}


def test_stop_strings_end_the_text(whole: Generation) -> None:
    """Within a piece, across pieces, at the very start, the earlier of two, and one that does not occur."""
    characters = whole.text
    cases = [[characters[9:10]], [characters[8:13]], [characters[:2]], [characters[15:19], characters[6:9]], ["no such text"]]
    stopped = workers.run(1, generate, [("the cat", config(stop=stops), None) for stops in cases])[0]
    for stops, generation in zip(cases, stopped, strict=True):
        places = [characters.find(stop) for stop in stops if stop in characters]
        assert generation.text == characters[: min(places, default=None)]
        assert generation.stop_reason == ("stop" if places else "length")
        count = len(generation.tokens)
        assert generation.tokens == whole.tokens[:count]
        assert generation.pieces == whole.pieces[:count]
        # no token was made after the one that completed a stop string
        assert all(stop not in "".join(generation.pieces[:-1]) for stop in stops)


def test_end_of_document_ends_unless_it_should_not(whole: Generation) -> None:
    eos = whole.tokens[7].id
    calls = [("the cat", config(), eos), ("the cat", config(stop_at_eos=False, compile=False), eos)]
    ended, kept = workers.run(1, generate, calls)[0]
    first = [token.id for token in whole.tokens].index(eos)
    assert ended.stop_reason == "eos"
    assert ended.tokens == whole.tokens[: first + 1]
    assert kept.stop_reason == "length"
    assert kept.tokens == whole.tokens


def test_an_empty_prompt_starts_a_document() -> None:
    started = workers.run(1, generate, [("", config(), None), ("", config(), None)])[0]
    assert started[0].tokens == started[1].tokens
    assert len(started[0].tokens) == COUNT


def side_by_side(rank: int, prompts: list[str], config_: DecodingConfig, size: int) -> list[Generation]:
    """Prompts in one batch; on their own with size 1."""
    spec_ = text_spec()
    decoder = Decoder(build(spec_), policy(spec_, "max_probability", 0.3), DecoderOptions(max_batch=size))
    return generate_texts(decoder, tokenizer(), prompts, config_, seed=3)


def test_texts_side_by_side_are_those_made_alone() -> None:
    prompts = ["the cat", "", "and the hat", "bat", "a hat and a bat"]
    free = workers.run(1, side_by_side, prompts, config(), 1)[0]
    config_ = config(stop=[free[0].text[4:7], free[3].text[2:9]])
    alone, batch = (workers.run(1, side_by_side, prompts, config_, size)[0] for size in (1, 3))
    assert {generation.stop_reason for generation in batch} == {"stop", "length"}
    for own, exact in zip(batch, alone, strict=True):
        assert (own.prompt, own.text, own.pieces, own.stop_reason) == (exact.prompt, exact.text, exact.pieces, exact.stop_reason)
        assert [(token.id, token.head) for token in own.tokens] == [(token.id, token.head) for token in exact.tokens]
        assert own.seconds > 0


def test_stops_are_found_where_they_begin() -> None:
    stops = Stops(["END", "ND!", ""])
    assert [stops.add(piece) for piece in ("a", "E", "", "N")] == [None] * 4
    assert stops.add("D!") == 1
    assert Stops([]).add("anything") is None
