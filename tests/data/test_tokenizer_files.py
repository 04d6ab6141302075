"""Tokenizers out of files of every kind, against the libraries and algorithms that they come from."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, models, processors

from eellm.config.schema import TokenizerConfig
from eellm.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from eellm.data.tokenizer_files import load_tokenizer, prepare_tokenizer
from eellm.errors import DataError, MissingExtra
from tests.data.conftest import UNICODE, WORDS
from tests.data.sentencepiece_models import sentencepiece_model

TEXTS = [
    UNICODE,
    " ".join(WORDS),
    "  two  spaces ",
    "tab\tline\nend\n\n",
    "naïve café №5 ½ ﬁ ｱﾞ",
    "<s>a</s><unk>▁b",
    "🙂𝄞\u200b",
    "",
]


def settings(path: Path, end_of_document: str | None = None) -> TokenizerConfig:
    return TokenizerConfig(kind="file", vocab_size=None, path=str(path), end_of_document=end_of_document, train_megabytes=1)


@pytest.fixture
def trained(data_config, tokenizer_config, text_folder) -> Tokenizer:
    return prepare_tokenizer(data_config(text_folder), tokenizer_config)[0]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_a_sentencepiece_model_is_what_its_library_makes_of_it(tmp_path, kind, rule):
    content = sentencepiece_model(kind, normalization_rule_name=rule, remove_extra_whitespaces=rule != "identity")
    (tmp_path / "tokenizer.model").write_bytes(content)
    tokenizer, library = load_tokenizer(tmp_path / "tokenizer.model"), SentencePieceProcessor(model_proto=content)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (library.vocab_size(), library.eos_id())
    for text in TEXTS:
        ids = library.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == library.decode(ids)
        if rule == "identity" and "▁" not in text:  # which is how it spells a space
            assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch(TEXTS) == library.encode(TEXTS)


def test_a_sentencepiece_model_without_an_end_gets_one(tmp_path):
    (tmp_path / "a.model").write_bytes(sentencepiece_model("bpe", eos_id=-1))
    tokenizer = load_tokenizer(tmp_path / "a.model")
    assert tokenizer.eod_id == 320 == tokenizer.vocab_size - 1
    assert tokenizer.decode([*tokenizer.encode("ab"), 320]) == "ab"
    assert load_tokenizer(tmp_path / "a.model", "<s>").eod_id == 1
    with pytest.raises(DataError, match=r"a\.model: tokenizer\.end_of_document=<eot>: the vocabulary has no such entry"):
        load_tokenizer(tmp_path / "a.model", "<eot>")


def test_a_sentencepiece_model_without_the_library_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.model").write_bytes(sentencepiece_model("bpe"))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtra, match=r"pip install 'eellm\[sentencepiece\]'"):
        load_tokenizer(tmp_path / "a.model")


def by_hand(text: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> list[int]:
    """Byte-level BPE by its definition: in every word, again and again, all pairs of the lowest rank become one piece."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + place) for place, byte in enumerate(byte for byte in range(256) if byte not in letter)}
    rank = {pair: place for place, pair in enumerate(merges)}
    ids = []
    # GPT-2's pattern for text in which \w is letters, digits and _ alone
    for word in re.findall(r"'(?:[stmd]|re|ve|ll)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text):
        pieces = [letter[byte] for byte in word.encode()]
        while pairs := [pair for pair in itertools.pairwise(pieces) if pair in rank]:
            best, merged, place = min(pairs, key=rank.__getitem__), [], 0
            while place < len(pieces):
                width = 2 if tuple(pieces[place : place + 2]) == best else 1
                merged.append("".join(pieces[place : place + width]))
                place += width
            pieces = merged
        ids += [vocabulary[piece] for piece in pieces]
    return ids


@pytest.mark.parametrize("prefix", ["", "gpt2-"])
def test_gpt2_files_are_byte_level_bpe_by_its_definition(trained, tmp_path, prefix):
    content = json.loads(trained.to_bytes())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    (tmp_path / f"{prefix}vocab.json").write_text(json.dumps(content["vocab"]))
    (tmp_path / f"{prefix}merges.txt").write_text("#version: 0.2\n" + "".join(f"{one} {two}\n" for one, two in merges))
    for path in (tmp_path, tmp_path / f"{prefix}vocab.json"):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.vocab_size, tokenizer.eod_id) == (trained.vocab_size, trained.eod_id)
        for text in [*TEXTS, "it's 3 o'clock, they'll say: naïve_tokens!  "]:
            if "½" not in text and "\u0301" not in text:
                assert tokenizer.encode(text) == by_hand(text, content["vocab"], merges)
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert load_tokenizer(path).token_bytes == trained.token_bytes


def test_merges_must_stand_beside_the_vocabulary(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(DataError, match=r"vocab\.json: there is no merges\.txt next to it"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(DataError, match="not a vocabulary and merges"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("end", [END_OF_DOCUMENT, "</s>", None])
def test_file_tokenizer_keeps_its_end_of_document_or_gets_one(data_config, tmp_path, end):
    vocab = {"a": 0, "b": 1} | ({} if end is None else {end: 2})
    tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(tmp_path / "own.json"))
    tokenizer, path = prepare_tokenizer(data_config(tmp_path), settings(tmp_path / "own.json"))
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (2, 3)
    assert load_tokenizer(path).eod_id == 2
    assert tokenizers.Tokenizer.from_file(str(path)).id_to_token(2) == (end or END_OF_DOCUMENT)


def test_the_end_of_document_can_be_named(data_config, tmp_path):
    """Another than the known one, in the file as an entry of its text: it becomes special, and its id stays."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1, "<eot>": 2}, merges=[]))
    backend.add_tokens([AddedToken("<eot>", special=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    known, path = prepare_tokenizer(data_config(tmp_path), settings(tmp_path))
    named, other_path = prepare_tokenizer(data_config(tmp_path), settings(tmp_path, "<eot>"))
    assert (known.eod_id, named.eod_id, named.vocab_size) == (1, 2, 3)
    assert path != other_path, "another end makes another corpus"
    assert named.encode("a<eot>") == [0]
    assert named.decode([0, 2, 0]) == load_tokenizer(other_path, "<eot>").decode([0, 2, 0])
    assert "eot" not in named.decode([0, 2, 0])
    with pytest.raises(DataError, match="end_of_document=<end>: the vocabulary has no such entry"):
        load_tokenizer(tmp_path, "<end>")


def test_padding_and_truncation_of_a_file_are_ignored(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "cut.json"))
    text = " ".join(WORDS)
    assert load_tokenizer(tmp_path / "cut.json").encode(text) == trained.encode(text)


def test_a_folder_is_what_it_holds(trained, tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer\.json, no \*\.model"):
        load_tokenizer(tmp_path)
    for name in ("one.model", "two.model"):
        (tmp_path / name).write_bytes(sentencepiece_model("bpe"))
    with pytest.raises(DataError, match=r"holds one\.model, two\.model\. Name one"):
        load_tokenizer(tmp_path)
    (tmp_path / "two.model").unlink()
    assert load_tokenizer(tmp_path).suffix == ".model"
    trained.save(tmp_path / "tokenizer.json")  # where there are several forms, the one that needs no extra
    assert load_tokenizer(tmp_path).to_bytes() == trained.to_bytes()


def test_unreadable_tokenizer_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text(json.dumps({"model": "?"}))
    with pytest.raises(DataError, match=r"bad\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")
    for content in (b"nonsense", b""):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.model: not a SentencePiece model"):
            load_tokenizer(tmp_path / "bad.model")


@pytest.mark.parametrize("form", ["tokenizer.json", "tokenizer.model"])
def test_a_run_needs_no_other_file_than_its_own(data_config, trained, tmp_path, form):
    from eellm.config.compose import compose
    from eellm.data.corpus import Corpus
    from eellm.rundir import RunDirectory
    from eellm.tasks.before_ranks import prepare
    from eellm.tasks.context import TaskContext
    from eellm.tasks.source import trained_tokenizer, with_trained_tokenizer

    given = tmp_path / "given" / form
    given.parent.mkdir()
    given.write_bytes(sentencepiece_model("unigram") if form.endswith("model") else trained.to_bytes())
    original = load_tokenizer(given, "<unk>" if form.endswith("model") else None)
    overrides = ["task=train", "data=text", f"data.path={tmp_path / 'texts'}", "data.sequence_length=16", "tokenizer=file"]
    overrides += [f"data.cache_dir={tmp_path / 'cache'}", f"tokenizer.path={given.parent}", "data.split=[0.8,0.2]"]
    overrides += ['tokenizer.end_of_document="<unk>"'] if form.endswith("model") else []
    config = compose(overrides)
    run = RunDirectory.create(tmp_path / "run", "{}", [], "")
    prepare(TaskContext(config, run.path))
    shutil.rmtree(given.parent)
    corpus = Corpus.load(run.corpus)
    shutil.rmtree(Path(corpus.tokenizer).parent)
    later = config.model_copy(update={"checkpoint": str(run.path)})
    kept = trained_tokenizer(later)
    assert run.tokenizer.name == form
    assert (kept.eod_id, kept.vocab_size, kept.encode(UNICODE)) == (
        original.eod_id,
        original.vocab_size,
        original.encode(UNICODE),
    )
    again = prepare_tokenizer(config.data, with_trained_tokenizer(later).tokenizer)[0]
    assert (again.eod_id, again.to_bytes()) == (corpus.eod_id, original.to_bytes())


@pytest.mark.parametrize("end", [False, True])
def test_prompts_begin_as_the_files_post_processor_says(trained, tmp_path, end):
    """Only prompts: documents are text and nothing else."""
    trained.save(tmp_path / "tokenizer.json")
    plain = load_tokenizer(tmp_path / "tokenizer.json")
    assert plain.encode_prompt("a text") == plain.encode("a text")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<s>", "</s>"])
    start, stop = (backend.token_to_id(token) for token in ("<s>", "</s>"))
    template = "<s> $A </s>" if end else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", start), ("</s>", stop)])
    backend.save(str(tmp_path / "llama.json"))
    dressed = load_tokenizer(tmp_path / "llama.json", "</s>")
    assert dressed.encode("a text") == plain.encode("a text")
    assert dressed.encode_prompt("a text") == [start, *plain.encode("a text")]
    assert dressed.decode(dressed.encode_prompt("a text")) == "a text"
