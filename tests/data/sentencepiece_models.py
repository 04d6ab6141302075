"""Tiny SentencePiece models, trained by its own library."""

from __future__ import annotations

import functools
import io
import random

from sentencepiece import SentencePieceTrainer

from tests.data.conftest import WORDS


@functools.cache
def sentencepiece_model(kind: str, **settings: object) -> bytes:
    """A .model of kind `unigram` or `bpe` on random words, with byte pieces for unknown characters."""
    rng = random.Random(0)
    content = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices([*WORDS, "ab"], k=12)) for _ in range(300)]),
        model_writer=content,
        model_type=kind,
        **{"vocab_size": 320, "byte_fallback": True, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2, **settings},
    )
    return content.getvalue()
