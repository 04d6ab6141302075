"""Is speculation lossless here? Its tokens against full depth's at every place of full depth's own texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eellm.benchmark.figure import Figure, not_run
from eellm.benchmark.generating import Pass
from eellm.benchmark.speed_quality import following
from eellm.decoding.continuation import Request
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.policy import Policy
from eellm.decoding.queue import SegmentQueue, SegmentRunner
from eellm.model.stage import Stage

DRAFT_LENGTH = 4
"""Of the decoder that is checked: an adaptive one may have come to draft nothing, and would agree with itself."""


@dataclass(frozen=True)
class Comparison:
    """Tokens compared, those drafted on the way, and of the compared ones that differed how far full depth's token was ahead of
    the next: log-probabilities, nats."""

    tokens: int
    drafted: int
    margins: list[float]


def loss_figures(full: Decoder, stage: Stage, policy: Policy, passes: Sequence[Pass], dtype: str) -> list[Figure]:
    """Of drafts by the `policy` on the stage of `full`. In fp32 no token may differ. Elsewhere passes of several rows round
    otherwise than of one, and what is counted are near ties: their margin is given."""
    speculative = Decoder(stage, policy, DecoderOptions("self_speculative", draft_length=DRAFT_LENGTH))
    compared = compare(full, speculative, passes)
    label = f"tokens unlike full depth's, of {compared.tokens:,}"
    target = 0.0 if dtype == "fp32" else None
    note = f"{compared.drafted:,} were drafted, {DRAFT_LENGTH} at a time"
    differing = Figure("self_speculative/differing", label, "tokens", float(len(compared.margins)), target=target, note=note)
    if not compared.drafted:
        return [not_run(differing, "no exit was sure enough to draft")]
    figures = [differing]
    if compared.margins:
        widest = max(compared.margins)
        figures.append(Figure("self_speculative/widest_margin", "full depth's widest margin there", "nats", widest))
    return figures


def compare(full: Decoder, speculative: Decoder, passes: Sequence[Pass]) -> Comparison:
    """Every prompt of full depth's `passes` once; the first tokens, which come with the prompts, do not count."""
    texts = {tuple(prompt): text for done in passes for prompt, text in zip(done.prompts, done.texts, strict=True)}
    tokens, margins, drafted_before = 0, [], speculative.steps.drafted
    for prompt, text in texts.items():
        own = following(speculative, prompt, Request(len(text)), text)
        tokens += len(text) - 1
        unlike = [place for place in range(1, len(text)) if own[place] != text[place]]
        margins += [margin(full, [*prompt, *text[:place]]) for place in unlike]
    return Comparison(tokens, speculative.steps.drafted - drafted_before, margins)


@torch.inference_mode()
def margin(full: Decoder, ids: Sequence[int]) -> float:
    """Log-probability of the final head's most probable token after `ids` less that of the second."""
    model = full.model
    runner, queue = SegmentRunner(model), SegmentQueue(model, model.cache(len(ids)))
    runner.push([queue], [ids])
    for index in range(len(model.segments)):
        runner.advance([queue], index)
    said = runner.read_final([queue]).statistics
    return float(said.probability.log() - said.second_probability.log())
