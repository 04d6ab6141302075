from __future__ import annotations

import json
import os
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from eellm.config.schema import TokenizerConfig
from eellm.data import tokenizer as module
from eellm.data.text import documents
from eellm.data.tokenizer import END_OF_DOCUMENT, TextStream, Tokenizer, all_cores, prepare_tokenizer, training_sample
from eellm.errors import DataError
from tests.data.conftest import WORDS

UNICODE = "plain ascii, naïve, 日本語, 🙂👩‍👩‍👧, \t\n\r\n é\u0301 \u202e and <|endoftext|> spelled out"


@pytest.fixture
def trained(data_config, tokenizer_config, text_folder) -> Tokenizer:
    return prepare_tokenizer(data_config(text_folder), tokenizer_config)[0]


@pytest.fixture
def byte_fallback() -> Tokenizer:
    """Spaces as ▁ and unknown characters as byte tokens: what SentencePiece tokenizers look like."""
    characters = ["▁", "a", "b", "é", "日"]
    vocab = {token: index for index, token in enumerate(["</s>", *characters, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend)


def random_ids(rng: random.Random, vocab_size: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(rng.randrange(12))]


def test_any_text_survives_the_round_trip(trained, byte_fallback):
    for text in (UNICODE, "", "🙂", "".join(map(chr, range(1, 0x3000)))):
        assert trained.decode(trained.encode(text)) == text
    assert byte_fallback.decode(byte_fallback.encode("ab 日本 é🙂")) == "ab 日本 é🙂"


def test_special_tokens_come_only_from_us(trained):
    assert trained.eod_id not in trained.encode(UNICODE)
    ids = trained.encode("before")
    assert trained.decode([*ids, trained.eod_id, *ids]) == "beforebefore"
    assert trained.pieces([trained.eod_id, *ids])[0] == ""


def test_batch_equals_single(trained):
    texts = [UNICODE, "", "a", " ".join(WORDS)]
    with all_cores():
        assert trained.encode_batch(texts) == [trained.encode(text) for text in texts]


@pytest.mark.parametrize("name", ["trained", "byte_fallback"])
def test_pieces_join_to_the_decoded_text_for_random_ids(name, request):
    tokenizer = request.getfixturevalue(name)
    rng = random.Random(1)
    for _ in range(3000):
        # byte tokens alone, so that broken and completed characters are frequent
        ids = random_ids(rng, min(tokenizer.vocab_size, 262))
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer.decode(ids)


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


@pytest.mark.parametrize("name", ["trained", "byte_fallback"])
def test_stream_gives_the_decoded_text(name, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("ab 日本 é🙂 ba")
    for count in range(len(ids) + 1):
        stream = TextStream(tokenizer)
        parts = [stream.add(token) for token in ids[:count]]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) + stream.finish() == tokenizer.decode(ids[:count])


def test_training_is_deterministic_and_cached_by_content(data_config, tokenizer_config, text_folder, monkeypatch, tmp_path):
    data = data_config(text_folder)
    first, path = prepare_tokenizer(data, tokenizer_config)
    elsewhere, other_path = prepare_tokenizer(data.model_copy(update={"cache_dir": str(tmp_path / "other")}), tokenizer_config)
    assert path != other_path
    assert path.name == other_path.name
    assert path.read_bytes() == other_path.read_bytes()
    assert first.vocab_size == elsewhere.vocab_size == 300

    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_train", fail)
        again, same_path = prepare_tokenizer(data, tokenizer_config)
    assert same_path == path
    assert again.to_json() == first.to_json()
    smaller = tokenizer_config.model_copy(update={"vocab_size": 280})
    assert prepare_tokenizer(data, smaller)[1] != path
    (text_folder / "new.txt").write_text("more text")
    assert prepare_tokenizer(data, tokenizer_config)[1] != path


def test_saved_tokenizer_is_the_same_one(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.vocab_size, loaded.eod_id) == (trained.vocab_size, trained.eod_id)
    assert loaded.encode(UNICODE) == trained.encode(UNICODE)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("end", [END_OF_DOCUMENT, "</s>", None])
def test_file_tokenizer_keeps_its_end_of_document_or_gets_one(data_config, tmp_path, end):
    vocab = {"a": 0, "b": 1} | ({} if end is None else {end: 2})
    tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(tmp_path / "own.json"))
    settings = TokenizerConfig(kind="file", vocab_size=None, path=str(tmp_path / "own.json"), train_megabytes=1)
    tokenizer, path = prepare_tokenizer(data_config(tmp_path), settings)
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (2, 3)
    assert Tokenizer.load(path).eod_id == 2
    assert tokenizers.Tokenizer.from_file(str(path)).id_to_token(2) == (end or END_OF_DOCUMENT)


def test_padding_and_truncation_of_a_file_are_ignored(data_config, trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "cut.json"))
    text = " ".join(WORDS)
    assert Tokenizer.load(tmp_path / "cut.json").encode(text) == trained.encode(text)


def test_unreadable_tokenizer_files_are_refused(data_config, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text(json.dumps({"model": "?"}))
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")


def test_training_sample_is_as_large_as_asked_and_spread(data_config, tmp_path):
    for number in range(200):
        (tmp_path / f"{number:03d}.txt").write_text(f"{number:03d} " + "x" * (100 if number % 2 else 900))
    data = data_config(tmp_path)
    assert list(training_sample(data, 1.0)) == [text for _, text in documents(data)]
    sample = list(training_sample(data, 0.02))
    numbers = [int(text[:3]) for text in sample]
    assert 0.019e6 <= sum(map(len, sample)) <= 0.022e6
    # a fifth of the text, so a fifth of each fifth of the documents
    for start in range(0, 200, 40):
        assert 4 <= len([number for number in numbers if start <= number < start + 40]) <= 20


def test_threads_are_off_after_use_and_a_users_choice_stands(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    for _ in range(2):
        with all_cores():
            assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
        assert os.environ["TOKENIZERS_PARALLELISM"] == "no"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with all_cores():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
