"""Conversations as tokens, and which of them the assistant said: only those count in the loss.

The latter are a second pair of files, `answers.bin/.idx` beside `tokens.bin/.idx`: 1 for a token of an answer (its end of turn
among them), else 0. Cut like the tokens, into the same windows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eellm.data.chat_template import ChatTemplate, Refused
from eellm.data.sources.chats import ASSISTANT
from eellm.data.sources.document import Document
from eellm.errors import DataError

if TYPE_CHECKING:
    import torch

    from eellm.data.batches import WindowDataset

ANSWERS = "answers"


def encode_chat(template: ChatTemplate, document: Document) -> tuple[list[int], list[int]]:
    """(token ids, 1 where the assistant said it else 0) of a conversation, without an end-of-document token.

    Raises DataError where the template refuses it, or does not render it turn by turn: then what an answer is cannot be told.
    """
    messages: list[Mapping[str, str]] = json.loads(document.text)
    for message in messages:
        spelled = template.spelled_special(message["content"])
        if spelled is not None:
            raise DataError(f"document {document.name}: a message holds {spelled!r}, which is a special token of the model.")
    try:
        ids = template.tokens_of(messages, asks=False)
        said = [0] * len(ids)
        for place in (place for place, message in enumerate(messages) if message["role"] == ASSISTANT):
            before = template.tokens_of(messages[:place], asks=True)
            after = template.tokens_of(messages[: place + 1], asks=False)
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise Refused("the chat template does not render it turn by turn: answers cannot be told from the rest")
            said[len(before) : len(after)] = [1] * (len(after) - len(before))
    except Refused as error:
        raise DataError(f"document {document.name}: {error}.") from error
    return ids, said


def answers_beside(prefix: Path) -> Path | None:
    """Prefix of the answers that belong to a pair of files; None where all of its text counts."""
    prefix = prefix.with_name(ANSWERS)
    return prefix if prefix.with_name(f"{ANSWERS}.idx").is_file() else None


class AnswerWindows:
    """Windows of conversations; a label counts where the assistant says it."""

    def __init__(self, tokens: WindowDataset, answers: WindowDataset):
        self._tokens, self._answers = tokens, answers

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:
        window = self._tokens[index]
        counts = self._answers[index]["labels"].to(window["loss_mask"].dtype)
        return {**window, "loss_mask": window["loss_mask"] * counts}


def arrays(ids: list[int], said: list[int], eod_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as they are stored: with the end-of-document token, which is not part of an answer."""
    return np.asarray([*ids, eod_id]), np.asarray([*said, 0])
