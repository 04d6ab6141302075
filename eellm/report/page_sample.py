"""Generated text on the page: every token coloured and underlined by the head that emitted it, details on hover."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from eellm.drawing.document import document
from eellm.drawing.number_text import fixed, percent, plural
from eellm.metrics.names import FINAL
from eellm.report.page_tables import colour
from eellm.report.run_record import Generation, RunRecord, Token

LINES = ("solid", "dashed", "dotted", "double")
"""Underlines by depth, so that exits differ without colour; they repeat from the fifth exit on."""
MOST_PROMPTS = 12
NOTE = "Colour and underline show the head that emitted a token; bold is the prompt. Point at a token for its confidence."


def page(record: RunRecord) -> str:
    """The samples as a page of their own."""
    return document("eellm: what it writes", f'<p class="note">{NOTE}</p>{samples(record)}', record.heads or [FINAL])


def samples(record: RunRecord, most_prompts: int = MOST_PROMPTS) -> str:
    """One block per prompt: its first continuation with early exits, the others of the same prompt folded below."""
    by_prompt: dict[str, list[Generation]] = {}
    for generation in record.generations:
        by_prompt.setdefault(generation.prompt, []).append(generation)
    blocks = [_prompt_block(record, generations) for generations in list(by_prompt.values())[:most_prompts]]
    left_out = len(by_prompt) - len(blocks)
    note = f'<p class="note">{plural(left_out, "more prompt")} in generations.jsonl.</p>' if left_out > 0 else ""
    return "".join(blocks) + note


def _prompt_block(record: RunRecord, generations: Sequence[Generation]) -> str:
    shown = max(generations, key=lambda generation: generation.variety)
    others = [generation for generation in generations if generation is not shown]
    folded = "".join(sample(record, generation) for generation in others)
    more = f"<details><summary>The same prompt at {_names(others)}</summary>{folded}</details>" if others else ""
    return sample(record, shown) + more


def _names(generations: Sequence[Generation]) -> str:
    return escape(", ".join(dict.fromkeys(generation.label for generation in generations)))


def sample(record: RunRecord, generation: Generation) -> str:
    """Prompt, continuation, and how many tokens each head emitted."""
    heads = record.heads or [FINAL]
    tokens = "".join(_token(heads, token) for token in generation.tokens) or escape(generation.text)
    text = f'<div class="text"><span class="prompt">{escape(generation.prompt)}</span>{tokens}</div>'
    return f'<div class="sample card">{_sample_header(record, generation)}{text}</div>'


def _sample_header(record: RunRecord, generation: Generation) -> str:
    counts = generation.heads
    total = sum(counts.values())
    facts = [generation.label]
    if total and generation.seconds:
        facts.append(f"{total} tokens in {fixed(generation.seconds, 2)} s")
    if total:
        layers = [record.layer_of(head) for head in counts for _ in range(counts[head])]
        known = [layer for layer in layers if layer is not None]
        if known:
            facts.append(f"{fixed(sum(known) / len(known), 1)} layers per token")
    stack = "".join(f'<i style="{colour(head)};flex:{counts[head]}"></i>' for head in record.heads if counts[head])
    return (
        f'<div class="note">{escape(", ".join(facts))}</div><div class="stack">{stack}</div>'
        f'<div class="legend">{"".join(_legend_entry(record, head, counts[head] / max(total, 1)) for head in record.heads)}</div>'
    )


def _legend_entry(record: RunRecord, head: str, share: float) -> str:
    if head == FINAL:
        return f'<span><span class="plain">{head}</span> {percent(share)}</span>'
    return f'<span><u style="{_look(record.heads, head)}">{escape(head)}</u> {percent(share)}</span>'


def _token(heads: Sequence[str], token: Token) -> str:
    head = token.head
    details = {"head": head, "layer": "" if token.exit_layer is None else str(token.exit_layer)}
    if token.confidence is not None:
        details["confidence"] = fixed(token.confidence)
    if token.logprob is not None:
        details["logprob"] = fixed(token.logprob, 2)
    data = "".join(f' data-{name}="{escape(value)}"' for name, value in details.items() if value)
    kind = "token final" if head == FINAL else "token"
    # An underline across a line break would run on to the margin: breaks stay outside.
    parts = ["".join(part) for _, part in groupby(token.text, key=lambda char: char == "\n")]
    style = _look(heads, head)
    return "".join(
        part if part[0] == "\n" else f'<span class="{kind}" style="{style}"{data}>{escape(part)}</span>' for part in parts
    )


def _look(heads: Sequence[str], head: str) -> str:
    exits = [name for name in heads if name != FINAL]
    line = LINES[exits.index(head) % len(LINES)] if head in exits else "solid"
    return f"{colour(head)};--line:{line}"
