"""Ids above 32,767 and 65,535 on their way from the text to a batch."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from eellm.data.batches import training_batches
from eellm.data.corpus import prepare_corpus
from eellm.data.tokenizer_files import load_tokenizer
from eellm.layout import ParallelLayout
from eellm.mcore.datasets import open_documents


@pytest.mark.parametrize(("entries", "dtype"), [(50_001, np.uint16), (70_001, np.int32)])
def test_ids_of_a_large_vocabulary_survive(run_config, tmp_path, entries, dtype):
    rng = random.Random(0)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):
        words = rng.choices(range(entries - 1), k=60)
        (folder / f"{number}.txt").write_text(" ".join(f"w{word}" for word in [entries - 2, 32_000, 32_768, *words]))
    backend = tokenizers.Tokenizer(models.WordLevel({f"w{word}": word for word in range(entries - 1)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (entries, entries - 1)

    config = run_config(folder)
    given = config.tokenizer.model_copy(update={"kind": "file", "path": str(tmp_path / "tokenizer.json")})
    config = config.model_copy(update={"tokenizer": given})
    corpus = prepare_corpus(config)
    documents = open_documents(Path(corpus.parts[0].prefix))
    stored = {tuple(tokens.tolist()) for tokens in documents}
    texts = [path.read_text().split() for path in folder.iterdir()]
    assert stored == {(*(int(word[1:]) for word in text), entries - 1) for text in texts}
    assert documents[0].dtype == dtype

    batches = training_batches(config, corpus, ParallelLayout(micro_batch_size=2, global_batch_size=8), 0, 0)
    pairs = {(one, other) for document in stored for one, other in itertools.pairwise(document)}
    seen = set()
    for step in range(corpus.train_samples // 8):
        batch = batches.batch(step)
        pairs_of_batch = zip(batch.tokens.flatten().tolist(), batch.labels.flatten().tolist(), strict=True)
        inside = {pair for pair in pairs_of_batch if pair[0] != entries - 1}
        assert inside <= pairs, "a token is followed by what follows it in the text"
        seen |= inside
    assert max(max(pair) for pair in seen) == entries - 1
