"""Tokens that lie on disk already, as Megatron's tools or `task=prepare_data` leave them: which files, and which tokenizer.

Beside `<prefix>.bin` and `<prefix>.idx` task=prepare_data leaves `<prefix>.tokenizer.json` and `<prefix>.json`, which says
how they were made; Megatron's own tools leave neither.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from eellm.config.paths import made_how, prefixes, tokenizer_beside
from eellm.config.schema import DataConfig, TokenizerConfig
from eellm.data.stored import Store
from eellm.data.tokenizer import Tokenizer, content_key
from eellm.data.tokenizer_files import load_tokenizer
from eellm.errors import DataError

logger = logging.getLogger(__name__)


def tokenizer_of(data: DataConfig, tokenizer: TokenizerConfig) -> TokenizerConfig:
    """The tokenizer that is configured, or where none is, that which lies beside the tokens.

    Raises DataError where there is none, or where the data sets of a blend were made with different ones.
    """
    if tokenizer.kind != "byte_bpe":
        return tokenizer
    found: dict[str, tuple[Path, str | None]] = {}
    for prefix in [*prefixes(data.path), *prefixes(data.validation_path)]:
        path = tokenizer_beside(prefix)
        if path is None:
            raise DataError(
                f"{prefix}: .bin/.idx files do not say how they were tokenised, and there is no {prefix.name}.tokenizer.json "
                "beside them. Give tokenizer=file tokenizer.path=<tokenizer.json>."
            )
        how = made_how(prefix)
        end = json.loads(how.read_text(encoding="utf-8")).get("end_of_document") if how.is_file() else None
        found.setdefault(content_key(load_tokenizer(path, end)), (path, end))
    if len(found) > 1:
        names = ", ".join(str(path) for path, _ in found.values())
        raise DataError(f"data.path: the data sets were made with different tokenizers: {names}.")
    ((path, end),) = found.values()
    return tokenizer.model_copy(update={"kind": "file", "path": str(path), "end_of_document": end})


def check_ends(data: DataConfig, store: Store, tokenizer: Tokenizer) -> None:
    """Documents without an end-of-document token: an error where the run needs to know the boundaries, else a warning."""
    if not store.without_end:
        return
    told = (
        f"{store.prefix}: {store.without_end} of {len(store.lengths)} documents do not end with the tokenizer's "
        f"end-of-document token (id {tokenizer.eod_id})"
    )
    if data.document_boundaries != "ignore":
        raise DataError(
            f"{told}, and data.document_boundaries={data.document_boundaries} finds boundaries by it. Prepare them with it "
            "(Megatron's --append-eod, or task=prepare_data), or set data.document_boundaries=ignore."
        )
    logger.warning("%s: the model will not see where they end, nor learn to end one", told)
