"""What holds for every tokenizer, whichever library it comes from."""

from __future__ import annotations

import os
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from eellm.data.hugging_face_tokenizer import HuggingFaceTokenizer, all_cores
from eellm.data.text_stream import TextStream
from eellm.data.tokenizer import Tokenizer, content_key
from eellm.data.tokenizer_files import load_tokenizer, prepare_tokenizer
from tests.data.conftest import UNICODE, WORDS
from tests.data.sentencepiece_models import sentencepiece_model

KINDS = ["trained", "byte_fallback", "unigram", "bpe"]


@pytest.fixture
def trained(data_config, tokenizer_config, text_folder) -> Tokenizer:
    return prepare_tokenizer(data_config(text_folder), tokenizer_config)[0]


@pytest.fixture
def byte_fallback() -> Tokenizer:
    """Spaces as ▁ and unknown characters as byte tokens: what a tokenizer.json made from SentencePiece's looks like."""
    characters = ["▁", "a", "b", "é", "日"]
    vocab = {token: index for index, token in enumerate(["</s>", *characters, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    return HuggingFaceTokenizer(backend)


@pytest.fixture
def unigram(tmp_path) -> Tokenizer:
    (tmp_path / "unigram.model").write_bytes(sentencepiece_model("unigram"))
    return load_tokenizer(tmp_path / "unigram.model")


@pytest.fixture
def bpe(tmp_path) -> Tokenizer:
    (tmp_path / "bpe.model").write_bytes(sentencepiece_model("bpe"))
    return load_tokenizer(tmp_path / "bpe.model")


@pytest.fixture(params=KINDS)
def each(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def random_ids(rng: random.Random, vocab_size: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(rng.randrange(12))]


def test_any_text_survives_the_round_trip(trained, each):
    for text in (UNICODE, "", "🙂", "".join(map(chr, range(1, 0x3000)))):
        assert trained.decode(trained.encode(text)) == text
    assert each.decode(each.encode("ab 日本 é🙂")) == "ab 日本 é🙂"


def test_special_tokens_come_only_from_us(each):
    end = "<|endoftext|> </s>"
    assert each.eod_id not in each.encode(f"{UNICODE} {end}")
    ids = each.encode("ab")
    assert each.decode([*ids, each.eod_id]) == "ab"
    assert each.decode([*ids, each.eod_id, *ids]).split(" ") in (["abab"], ["ab", "ab"])
    assert each.pieces([each.eod_id, *ids])[0] == ""


def test_batch_equals_single(each):
    texts = [UNICODE, "", "a", " ".join(WORDS)]
    assert each.encode_batch(texts) == [each.encode(text) for text in texts]


def test_pieces_join_to_the_decoded_text_for_random_ids(each):
    rng = random.Random(1)
    for _ in range(1000):
        # byte tokens alone, so that broken and completed characters are frequent
        ids = random_ids(rng, min(each.vocab_size, 262))
        pieces = each.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == each.decode(ids)


@pytest.mark.parametrize("name", ["trained", "byte_fallback"])
def test_a_character_belongs_to_the_token_that_completes_it(name, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("a𝄞b")
    assert len(ids) == 6
    assert tokenizer.pieces(ids) == ["a", "", "", "", "𝄞", "b"]
    assert tokenizer.pieces(ids[:3]) == ["a", "", tokenizer.decode(ids[:3])[1:]]
    assert tokenizer.pieces([]) == []


def test_pieces_of_both_kinds_agree(trained):
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(
            chr(rng.choice((rng.randrange(1, 0x250), rng.randrange(0x3000, 0xD800), rng.randrange(0x1F300, 0x1F700))))
            for _ in range(9)
        )
        ids = trained.encode(text)
        # cut anywhere, also inside a character
        ids = ids[: rng.randrange(len(ids) + 1)]
        assert trained.pieces(ids) == trained._pieces_of_prefixes(ids)


def test_stream_gives_the_decoded_text(each):
    ids = each.encode("ab 日本 é🙂 ba")
    for count in range(len(ids) + 1):
        stream = TextStream(each)
        parts = [stream.add(token) for token in ids[:count]]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) + stream.finish() == each.decode(ids[:count])


def test_saved_tokenizer_is_the_same_one(each, tmp_path):
    path = tmp_path / f"saved{each.suffix}"
    each.save(path)
    loaded = load_tokenizer(path)
    assert (loaded.vocab_size, loaded.eod_id) == (each.vocab_size, each.eod_id)
    assert loaded.encode(UNICODE) == each.encode(UNICODE)
    assert content_key(loaded) == content_key(each)
    assert loaded.to_bytes() == path.read_bytes()


def test_threads_are_off_after_use_and_a_users_choice_stands(monkeypatch, trained):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    for _ in range(2):
        with all_cores():
            assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
        assert os.environ["TOKENIZERS_PARALLELISM"] == "no"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    trained.encode_batch(["a", "b"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
