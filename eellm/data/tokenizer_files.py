"""Tokenizers as files: what a path names, and the one file that a run's tokenizer has in the cache."""

from __future__ import annotations

import os
from pathlib import Path

import tokenizers
from tokenizers import models

from eellm.config.schema import DataConfig, TokenizerConfig
from eellm.data.cache import cache_key, cache_root
from eellm.data.hugging_face_tokenizer import HuggingFaceTokenizer, byte_level
from eellm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from eellm.data.text import fingerprint
from eellm.data.tokenizer import Tokenizer, content_key
from eellm.data.tokenizer_training import TRAINING_VERSION, train_byte_bpe
from eellm.errors import DataError

_VOCABULARY, _MERGES = "vocab.json", "merges.txt"


def configured_vocab_size(config: TokenizerConfig) -> int:
    """Entries of a tokenizer, also of one that is still to be trained."""
    if config.kind == "byte_bpe":
        assert config.vocab_size is not None, "checked with the config"
        return config.vocab_size
    assert config.path is not None, "checked with the config"
    return load_tokenizer(config.path, config.end_of_document).vocab_size


def load_tokenizer(path: str | Path, end_of_document: str | None = None) -> Tokenizer:
    """Read a tokenizer.json, a SentencePiece .model, GPT-2's vocab.json with its merges.txt, or a folder with one of them.

    `end_of_document` names the token that ends a document; None = a known name. Raises DataError when the file is missing
    or something else, MissingExtra for SentencePiece's without its library.
    """
    path = Path(os.path.expandvars(path)).expanduser()
    if not path.exists():
        raise DataError(f"tokenizer {path}: there is no such file or folder.")
    file = _file_in(path) if path.is_dir() else path
    try:
        if file.suffix == SentencePieceTokenizer.suffix:
            return SentencePieceTokenizer(file.read_bytes(), end_of_document)
        backend = _gpt2(file) if file.name.endswith(_VOCABULARY) else _tokenizer_json(file)
        return HuggingFaceTokenizer(backend, end_of_document)
    except DataError as error:
        raise DataError(f"tokenizer {file}: {error}") from error


def prepare_tokenizer(data: DataConfig, tokenizer: TokenizerConfig, corpus: str | None = None) -> tuple[Tokenizer, Path]:
    """The tokenizer of a run and its file in the cache: read from the user's file, or trained on the corpus.

    `corpus` is the corpus's fingerprint where the caller has it already. Training is deterministic and done once per
    corpus and settings.
    """
    folder = cache_root(data) / "tokenizers"
    if tokenizer.kind == "file":
        if tokenizer.path is None:
            raise DataError("tokenizer.kind=file needs tokenizer.path: a tokenizer's file or folder.")
        loaded = load_tokenizer(tokenizer.path, tokenizer.end_of_document)
        path = folder / f"{content_key(loaded)}{loaded.suffix}"
    else:
        if tokenizer.vocab_size is None:
            raise DataError("tokenizer.kind=byte_bpe needs tokenizer.vocab_size: the entries of the vocabulary to train.")
        settings = [tokenizer.vocab_size, tokenizer.train_megabytes]
        path = folder / f"{cache_key(TRAINING_VERSION, corpus or fingerprint(data), *settings)}.json"
        if path.is_file():
            return load_tokenizer(path), path
        loaded = train_byte_bpe(data, tokenizer.vocab_size, tokenizer.train_megabytes)
    if not path.is_file():
        loaded.save(path)
    return loaded, path


def _file_in(folder: Path) -> Path:
    for pattern in ("tokenizer.json", "*.model", f"*{_VOCABULARY}"):
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            raise DataError(f"tokenizer {folder}: holds {', '.join(file.name for file in files)}. Name one of them.")
        if files:
            return files[0]
    raise DataError(f"tokenizer {folder}: holds no tokenizer.json, no *.model (SentencePiece) and no {_VOCABULARY} (GPT-2).")


def _tokenizer_json(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for anything it cannot read
        raise DataError(f"not a tokenizer.json ({error}).") from error


def _gpt2(vocabulary: Path) -> tokenizers.Tokenizer:
    """The merges stand next to the vocabulary: merges.txt, or gpt2-merges.txt next to gpt2-vocab.json."""
    merges = vocabulary.with_name(vocabulary.name.removesuffix(_VOCABULARY) + _MERGES)
    if not merges.is_file():
        raise DataError(f"there is no {merges.name} next to it.")
    try:
        return byte_level(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:
        raise DataError(f"not a vocabulary and merges of byte-level BPE ({error}).") from error
