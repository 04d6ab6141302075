"""Small corpora and the part of a config that the data package reads."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from eellm.config.schema import Config, DataConfig, DebugConfig, ModelConfig, TokenizerConfig, TrainerConfig

WORDS = [
    "the",
    "a",
    "token",
    "exit",
    "early",
    "layer",
    "model",
    "naïve",
    "über",
    "日本",
    "語",
    "🙂",
    "head",
    "loss",
    "of",
    "to",
    "and",
    "in",
    "is",
    "deep",
]

UNICODE = "plain ascii, naïve, 日本語, 🙂👩‍👩‍👧, \t\n\r\n é\u0301 \u202e and <|endoftext|> spelled out"


def data_values(path: Path | str | None, **changes: object) -> dict[str, object]:
    return {
        "source": "text",
        "path": None if path is None else str(path),
        "include_tests": False,
        "pattern": "**/*.txt",
        "text_field": "text",
        "weights": None,
        "validation_path": None,
        "subset": None,
        "hf_split": "train",
        "split": [0.8, 0.2],
        "sequence_length": 16,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "ramp_up": None,
        "document_boundaries": "ignore",
        "cache_dir": "unused",
        "num_workers": 0,
    } | changes


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., DataConfig]:
    def build(path: Path | str | None = None, **changes: object) -> DataConfig:
        return DataConfig(**data_values(path, cache_dir=str(tmp_path / "cache"), **changes))

    return build


@pytest.fixture
def tokenizer_config() -> TokenizerConfig:
    return TokenizerConfig(kind="byte_bpe", vocab_size=300, path=None, end_of_document=None, train_megabytes=1.0)


@pytest.fixture
def run_config(data_config: Callable[..., DataConfig], tokenizer_config: TokenizerConfig) -> Callable[..., Config]:
    """Builds a config with the nodes that data code reads, and no others."""

    def build(path: Path | None = None, *, seed: int = 1, overfit: bool = False, **data: object) -> Config:
        return Config.model_construct(
            seed=seed,
            data=data_config(path, **data),
            tokenizer=tokenizer_config,
            model=ModelConfig.model_construct(vocab_size=None),
            trainer=TrainerConfig.model_construct(val_batches=3),
            debug=DebugConfig(detect_anomaly=False, profile=False, timeline=False, overfit=overfit),
        )

    return build


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """40 files of 20 to 200 random words, two of them equal, one blank, in two folders."""
    rng = random.Random(0)
    folder = tmp_path / "texts"
    for number in range(40):
        path = folder / ("first" if number < 20 else "second") / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(rng.choices(WORDS, k=rng.randrange(20, 200))), encoding="utf-8")
    (folder / "second" / "39.txt").write_bytes((folder / "first" / "03.txt").read_bytes())
    (folder / "second" / "blank.txt").write_text(" \n\n")
    return folder
