"""Training a byte-level BPE tokenizer on a corpus."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from tokenizers import models, pre_tokenizers, trainers

from eellm.config.schema import DataConfig
from eellm.data.hugging_face_tokenizer import HuggingFaceTokenizer, all_cores, byte_level
from eellm.data.text import documents
from eellm.data.tokenizer import END_OF_DOCUMENT

logger = logging.getLogger(__name__)

TRAINING_VERSION = 1
"""Raised whenever the same corpus and settings train to another tokenizer."""


def train_byte_bpe(data: DataConfig, vocab_size: int, megabytes: float) -> HuggingFaceTokenizer:
    """A tokenizer of `vocab_size` entries from about `megabytes` of the corpus; the same each time."""
    logger.info("training a byte-level BPE tokenizer with %d entries on %g MB of text", vocab_size, megabytes)
    backend = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with all_cores():
        backend.train_from_iterator(training_sample(data, megabytes), trainer)
    return HuggingFaceTokenizer(backend)


def training_sample(data: DataConfig, megabytes: float) -> Iterator[str]:
    """Documents of about `megabytes` in all, spread evenly over the corpus; all of it if it is smaller."""
    budget = megabytes * 1e6
    total = sum(len(document.text) for document in documents(data))
    seen = taken = 0
    for _, text in documents(data):
        # compared before the document is counted, or large documents would be favoured
        if taken <= budget * seen / max(total, budget):
            yield text
            taken += len(text)
        seen += len(text)
