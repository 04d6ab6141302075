"""What a path in the config means: `~`, environment variables, and the prefix of a pair of files."""

from __future__ import annotations

import os
from pathlib import Path

TOKENIZERS_BESIDE = (".tokenizer.json", ".tokenizer.model")
"""Behind a prefix: the tokenizer that task=prepare_data leaves beside its tokens."""


def expanded(path: str) -> Path:
    """`~` and environment variables replaced."""
    return Path(os.path.expandvars(path)).expanduser()


def prefixes(paths: str | list[str] | None) -> list[Path]:
    """The prefixes of .bin/.idx files that a path or list of paths names; one typed with its ending is meant without."""
    listed = [] if paths is None else [paths] if isinstance(paths, str) else paths
    return [path.with_suffix("") if path.suffix in (".bin", ".idx") else path for path in map(expanded, listed)]


def tokenizer_beside(prefix: Path) -> Path | None:
    """The tokenizer's file that lies beside tokens, if any."""
    return next((path for path in (Path(f"{prefix}{ending}") for ending in TOKENIZERS_BESIDE) if path.is_file()), None)


def made_how(prefix: Path) -> Path:
    """The file beside tokens that says how task=prepare_data made them."""
    return Path(f"{prefix}.json")
