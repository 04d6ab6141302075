"""Generated tokens one by one: which head emitted them, where in the text, and what kind of token they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import pandas as pd

from eellm.analysis.run_folder import RunFiles
from eellm.analysis.runs import gather
from eellm.analysis.wandb_project import WandbFiles
from eellm.drawing.number_text import threshold

Kind = Literal["word", "continuation", "number", "symbol", "space", "partial"]
KINDS: dict[Kind, str] = {
    "word": "begins a word",
    "continuation": "goes on with a word",
    "number": "digits",
    "symbol": "punctuation and operators",
    "space": "blanks and line ends alone",
    "partial": "part of a character, no text yet",
}
FULL_DEPTH = "full depth"
COLUMNS = ("generation", "decoding", "threshold", "position", "kind", "text", "head", "exit_layer", "confidence", "logprob")


def token_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a token of every run's generations.jsonl: `run`, `name`, the settings, `generation` (its number in the file),
    `decoding`, `threshold` (as text, `full depth` where nothing may exit), `position` (from 0, prompt not counted), `kind` (see
    KINDS), `text`, `head`, `exit_layer`, `confidence`, `logprob`. Runs of a wandb project have none: generations stay in the run
    directory."""
    return gather(runs, _tokens, COLUMNS)


def kind_of(text: str, before: str) -> Kind:
    """What a token's text is; `before`: the text in front of it, since only that tells the beginning of a word from its rest."""
    stripped = text.strip()
    if not text:
        return "partial"
    if not stripped:
        return "space"
    if not (stripped[0].isalnum() or stripped[0] == "_"):
        return "symbol"
    if stripped[0].isdigit() and not _within_word(text, before):
        return "number"
    return "continuation" if _within_word(text, before) else "word"


def _within_word(text: str, before: str) -> bool:
    return not text[0].isspace() and re.search(r"[^\W\d]\w*$", before) is not None


def _tokens(files: RunFiles | WandbFiles) -> Iterable[dict[str, Any]]:
    for number, generation in enumerate(files.generations()):
        before = generation["prompt"]
        for position, token in enumerate(generation["tokens"]):
            yield {
                "generation": number,
                "decoding": generation["decoding"],
                "threshold": FULL_DEPTH if generation["decoding"] == "full" else threshold(generation["threshold"]),
                "position": position,
                "kind": kind_of(token["text"], before[-64:]),
                **{column: token[column] for column in ("text", "head", "exit_layer", "confidence", "logprob")},
            }
            before += token["text"]
