"""Texts to be scored, cut into what the model reads at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """`inputs` enter the model; the distribution behind each of the last `len(labels)` of them is that of a label."""

    inputs: tuple[int, ...]
    labels: tuple[int, ...]


def windows(context: Sequence[int], text: Sequence[int], longest: int) -> Iterator[Window]:
    """Windows of at most `longest` inputs in which every token of `text` is predicted once, from as much as fits before it.

    `context` has at least one token, and is cut on its left. A text longer than `longest` takes several windows, as
    harness tasks with rolling log-likelihoods have them (`lm_eval.utils.get_rolling_token_windows`).
    """
    whole, start = (*context, *text), len(context)
    while start < len(whole):
        end = min(start + longest, len(whole))
        yield Window(whole[max(0, end - 1 - longest) : end - 1], whole[start:end])
        start = end
