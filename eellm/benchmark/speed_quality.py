"""Speed against quality: the same prompts at full depth, and by several modes at several thresholds, side by side in one run.

What the columns of speed_quality.csv mean here:
- Decoding is the user's: free-running, batch 1, with the sampling options given. Every run makes all
  `max_new_tokens` tokens; stop strings and the end-of-document token do not end it.
- `tokens_per_second`: tokens after each prompt's first one over their time, the median over repeats. Prefill is the
  same for all settings and not counted. Over several stages the time goes on until all of them are idle again: the early
  stages may be ahead of the last one, which still fills its keys and values.
- `speedup`: the median over repeats of full depth's time over the setting's. Within a repeat, settings alternate
  prompt by prompt, and the order turns from repeat to repeat.
- `agreement`: at every position of full depth's own text, does the setting emit full depth's token, given full depth's
  tokens before it (and, when sampling, the same random number)? Measured by following that text, so one early
  difference does not count twice. The first token is full depth's by construction and not counted. Speculation is
  lossless, so when greedy its share is 1 but for rounding; when sampling its random numbers decide otherwise.
- `mean_layers`, `share_<head>`: of the free-running tokens, first ones left out: layers passed before a token was
  emitted, and who emitted it.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from eellm.config.schema import DecodingConfig
from eellm.decoding.continuation import Request, Token
from eellm.decoding.decoder import Decoder
from eellm.decoding.pipeline.staged import StagedDecoder
from eellm.decoding.setting import Setting, threshold_cell
from eellm.device_clock import seconds_on
from eellm.mcore.groups import Groups
from eellm.metrics.names import share_column
from eellm.metrics.tables import TableRow
from eellm.model.stage import Stage


@dataclass
class _Row:
    """One row of the table on its way; later stages have neither times nor texts."""

    staged: StagedDecoder
    seconds: list[float] = field(default_factory=list)
    texts: list[list[Token]] = field(default_factory=list)
    agreement: float | None = 1.0

    def time(self, prompt: Sequence[int], request: Request) -> None:
        """Continue a prompt once more."""
        made = self.staged.lead(partial(_continuation, prompt, request))
        if made is not None:
            tokens, started = made
            self.seconds[-1] += seconds_on(self.staged.device) - started
            self.texts.append(tokens)


def speed_against_quality(
    stage: Stage,
    groups: Groups,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Setting],
    decoding: DecodingConfig,
    repeats: int = 3,
) -> list[TableRow]:
    """Rows of speed_quality.csv, one a setting; the first one (full depth) is what the others are compared with.

    Prompts are token ids; of `decoding` the number of new tokens and the sampling count here. All ranks of the layout call
    it; over several stages they decode together, and only those of the first one get rows. Times are each rank's own.
    `accuracy` needs labels and is left open.
    """
    requests = [replace(Request.of(decoding, seed, None), eos_id=None) for seed in range(len(prompts))]
    longest = max(prompts, key=len)
    # one cache for all prompts and a whole generation: CUDA graphs go with their cache, and their capture is not to be timed
    max_tokens = len(longest) + decoding.max_new_tokens - 1
    options = [replace(setting.options, max_tokens=max_tokens) for setting in settings]
    rows = [_Row(StagedDecoder(stage, setting.policy, own, groups)) for setting, own in zip(settings, options, strict=True)]
    for row in rows:
        row.staged.lead(lambda decoder: list(decoder.generate(longest, requests[0])))
    for repeat in range(repeats):
        _run(rows, prompts, requests, repeat)
    for row in rows[1:]:
        row.agreement = row.staged.lead(lambda decoder: _agreement(decoder, prompts, requests, rows[0].texts))
    return [_cells(row, row.staged.decoder, rows[0]) for row in rows if row.staged.decoder is not None]


def _run(rows: list[_Row], prompts: Sequence[Sequence[int]], requests: list[Request], repeat: int) -> None:
    """One repeat: every prompt at every setting."""
    for row in rows:
        row.seconds.append(0.0)
        row.texts = []
    turn = repeat % len(rows)
    for prompt, request in zip(prompts, requests, strict=True):
        for row in rows[turn:] + rows[:turn]:
            row.time(prompt, request)


def _continuation(prompt: Sequence[int], request: Request, decoder: Decoder) -> tuple[list[Token], float]:
    """A prompt's tokens, and when the first one was there."""
    sequence = decoder.start(prompt, request)
    decoder.step()
    started = seconds_on(decoder.model.device)
    while decoder.step():
        pass
    return sequence.tokens, started


def _agreement(
    decoder: Decoder, prompts: Sequence[Sequence[int]], requests: list[Request], texts: list[list[Token]]
) -> float | None:
    """Share of the tokens of `texts`, first ones left out, that the decoder emits given those before; None without any."""
    same: list[bool] = []
    for prompt, request, text in zip(prompts, requests, texts, strict=True):
        ids = [token.id for token in text]
        same += [own == given for own, given in zip(following(decoder, prompt, request, ids), ids, strict=True)][1:]
    return sum(same) / len(same) if same else None


def following(decoder: Decoder, prompt: Sequence[int], request: Request, text: Sequence[int]) -> list[int]:
    """What the decoder emits at every place of `text` (as many tokens as `request` wants), given the text before that place."""
    sequence = decoder.start(prompt, request)
    own: list[int] = []
    while len(own) < len(text):
        decoder.step()
        for place in range(len(own), len(sequence.tokens)):
            own.append(sequence.tokens[place].id)
            if own[-1] != text[place]:
                # over several stages tokens come one by one, and this one has not entered any yet
                sequence.replace(place, text[place])
                break
    return own


def _cells(row: _Row, decoder: Decoder, full: _Row) -> TableRow:
    tokens = [token for text in row.texts for token in text[1:]]
    ratios = [ours / own for ours, own in zip(full.seconds, row.seconds, strict=True) if own > 0]
    heads = Counter(token.head for token in tokens)
    count = max(len(tokens), 1)
    shares = {share_column(head): heads[head] / count for head in decoder.spec.heads}
    return {
        "decoding": decoder.options.mode,
        "policy": decoder.policy.kind,
        "threshold": threshold_cell(decoder.policy),
        "tokens_per_second": len(tokens) / statistics.median(row.seconds) if tokens else None,
        "speedup": statistics.median(ratios) if ratios else None,
        "agreement": row.agreement,
        "accuracy": None,
        "mean_layers": sum(token.exit_layer for token in tokens) / count,
        **shares,
    }
