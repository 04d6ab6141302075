"""Decoding the slow way: every token from a forward pass of the plain model over the whole text so far, in fp64.

No KV cache, no queues, no `eellm.decoding`: an exit's logits for the newest token do not depend on which tokens before
it left early, so what early exit must emit follows from the plain model alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from eellm.data.batch import Microbatch
from eellm.model.spec import ModelSpec
from tests.reference import Reference


@dataclass(frozen=True)
class Rule:
    """An exit rule written out by hand; `thresholds` by exit layer."""

    kind: str
    thresholds: dict[int, float] = field(default_factory=dict)
    min_new_tokens: int = 0
    max_pending: int | None = None


@dataclass(frozen=True)
class Expected:
    id: int
    head: str
    confidence: float
    logprob: float


def head_logits(spec: ModelSpec, parameters: dict, ids: list[int]) -> dict[str, torch.Tensor]:
    """Head name -> logits [positions, vocabulary] of a text, divided by the head's temperature."""
    tokens = torch.tensor([ids])
    batch = Microbatch(tokens, tokens, torch.ones(1, len(ids)), torch.arange(len(ids)).unsqueeze(0))
    whole = {name: torch.from_numpy(value).double() for name, value in parameters.items()}
    return {name: logits[0] for name, logits in Reference(spec, whole).logits(batch).items()}


def decode(spec: ModelSpec, parameters: dict, prompt: tuple[int, ...], count: int, rule: Rule) -> list[Expected]:
    """Greedy decoding with early exits."""
    ids, speaker, out = list(prompt), _Speaker(spec, rule), []
    for _ in range(count):
        out.append(speaker.next({name: all_[-1] for name, all_ in head_logits(spec, parameters, ids).items()}))
        ids.append(out[-1].id)
    return out


def follow(spec: ModelSpec, parameters: dict, prompt: tuple[int, ...], ids: list[int], rule: Rule) -> list[Expected]:
    """What greedy decoding makes of each prefix of a text, out of one forward pass: its own text where all ids are equal."""
    logits, speaker = head_logits(spec, parameters, [*prompt, *ids]), _Speaker(spec, rule)
    places = range(len(prompt) - 1, len(prompt) - 1 + len(ids))
    return [speaker.next({name: all_[place] for name, all_ in logits.items()}) for place in places]


class _Speaker:
    """Who says the next token, by a rule that looks back at how many left early."""

    def __init__(self, spec: ModelSpec, rule: Rule):
        self.spec, self.rule, self.number, self.pending = spec, rule, 0, 0

    def next(self, logits: dict[str, torch.Tensor]) -> Expected:
        rule, spec = self.rule, self.spec
        forced = self.number == 0 or self.number < rule.min_new_tokens
        forced = forced or (rule.max_pending is not None and self.pending >= rule.max_pending)
        head = "final" if forced else who_speaks(spec, logits, rule)
        layer = spec.num_layers if head == "final" else int(head.removeprefix("exit_"))
        self.pending = 0 if layer == spec.num_layers else self.pending + 1
        self.number += 1
        return expected(spec, head, logits[head])


def who_speaks(spec: ModelSpec, logits: dict[str, torch.Tensor], rule: Rule) -> str:
    predictions = []
    for exit_ in spec.exits:
        if exit_.layer not in rule.thresholds:
            continue
        probabilities = sorted(logits[exit_.name].softmax(0).tolist(), reverse=True)
        predictions.append(int(logits[exit_.name].argmax()))
        threshold = rule.thresholds[exit_.layer]
        entropy = -sum(p * math.log(p) for p in probabilities if p > 0) / math.log(spec.vocab_size)
        last = predictions[-int(threshold) :] if rule.kind == "patience" else []
        confident = {
            "max_probability": probabilities[0] >= threshold,
            "margin": probabilities[0] - probabilities[1] >= threshold,
            "entropy": entropy <= threshold,
            "patience": len(last) == threshold and len(set(last)) == 1,
            "fixed_layer": True,
        }
        if confident[rule.kind]:
            return exit_.name
    return "final"


def expected(spec: ModelSpec, head: str, logits: torch.Tensor) -> Expected:
    """`logits` [vocabulary] at the head's temperature."""
    id_ = int(logits.argmax())
    temperature = 1.0 if head == "final" else next(e.temperature for e in spec.exits if e.name == head)
    logprob = (logits * temperature).log_softmax(0)[id_]
    return Expected(id_, head, float(logits.softmax(0).max()), float(logprob))
