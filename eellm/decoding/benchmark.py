"""Speed against quality: the same prompts at full depth and at several thresholds, side by side in one run.

What the columns of speed_quality.csv mean here:
- Decoding is the user's: free-running, batch 1, with the sampling options given. Every run makes all
  `max_new_tokens` tokens; stop strings and the end-of-document token do not end it.
- `tokens_per_second`: tokens after each prompt's first one over their time, the median over repeats. Prefill is the
  same for all settings and not counted.
- `speedup`: the median over repeats of full depth's time over the setting's. Within a repeat, settings alternate
  prompt by prompt, and the order turns from repeat to repeat.
- `agreement`: at every position of full depth's own text, does the setting emit full depth's token, given full depth's
  tokens before it (and, when sampling, the same random number)? Measured by following that text, so one early
  difference does not count twice. The first token is full depth's by construction and not counted.
- `mean_layers`, `share_<head>`: of the free-running tokens, first ones left out: layers passed before a token was
  emitted, and who emitted it.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from eellm.config.schema import DecodingConfig, ExitPolicyConfig
from eellm.decoding.continuation import Request, Token
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.policy import Policy, build_policy, never_exit
from eellm.metrics.names import share_column
from eellm.metrics.tables import TableRow
from eellm.model.stage import Stage

_WARM_UP_TOKENS = 4


@dataclass
class _Setting:
    """One row of the table on its way."""

    decoder: Decoder
    seconds: list[float] = field(default_factory=list)
    texts: list[list[Token]] = field(default_factory=list)
    agreement: float | None = 1.0


def speed_against_quality(
    stage: Stage,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    exit_policy: ExitPolicyConfig,
    thresholds: Sequence[float],
    repeats: int = 3,
) -> list[TableRow]:
    """Rows of speed_quality.csv: full depth first, then `exit_policy` at each threshold (catch_up). Prompts are token ids.

    All tensor-parallel ranks call it; times are each rank's own. `accuracy` needs labels and is left open.
    """
    requests = [replace(Request.of(decoding, seed, None), eos_id=None) for seed in range(len(prompts))]
    policies = [build_policy(exit_policy.model_copy(update={"threshold": value}), stage.spec) for value in thresholds]
    settings = [_Setting(Decoder(stage, never_exit(stage.spec), DecoderOptions("full")))]
    settings += [_Setting(Decoder(stage, policy, DecoderOptions("catch_up", decoding.max_pending))) for policy in policies]
    for setting in settings:
        list(setting.decoder.generate(prompts[0], replace(requests[0], max_new_tokens=_WARM_UP_TOKENS)))
    for repeat in range(repeats):
        _run(settings, prompts, requests, repeat)
    for setting in settings[1:]:
        setting.agreement = _agreement(setting.decoder, prompts, requests, settings[0].texts)
    return [_row(setting, settings[0], len(prompts)) for setting in settings]


def _run(settings: list[_Setting], prompts: Sequence[Sequence[int]], requests: list[Request], repeat: int) -> None:
    """One repeat: every prompt at every setting."""
    for setting in settings:
        setting.seconds.append(0.0)
        setting.texts = []
    turn = repeat % len(settings)
    for prompt, request in zip(prompts, requests, strict=True):
        for setting in settings[turn:] + settings[:turn]:
            decoder = setting.decoder
            sequence = decoder.start(prompt, request)
            decoder.step()
            started = _now(decoder)
            while decoder.step():
                pass
            setting.seconds[-1] += _now(decoder) - started
            setting.texts.append(sequence.tokens)


def _agreement(
    decoder: Decoder, prompts: Sequence[Sequence[int]], requests: list[Request], texts: list[list[Token]]
) -> float | None:
    """Share of the tokens of `texts`, first ones left out, that the decoder emits given those before; None without any."""
    same = []
    for prompt, request, text in zip(prompts, requests, texts, strict=True):
        sequence = decoder.start(prompt, request)
        for token in text:
            ((_, own),) = decoder.step()
            same.append(own.id == token.id)
            sequence.replace_last(token.id)
        del same[-len(text)]
    return sum(same) / len(same) if same else None


def _row(setting: _Setting, full: _Setting, num_prompts: int) -> TableRow:
    decoder = setting.decoder
    tokens = [token for text in setting.texts for token in text[1:]]
    ratios = [ours / own for ours, own in zip(full.seconds, setting.seconds, strict=True) if own > 0]
    heads = Counter(token.head for token in tokens)
    count = max(len(tokens), 1)
    shares = {share_column(head): heads[head] / count for head in decoder.spec.heads}
    return {
        "decoding": decoder.options.mode,
        "policy": decoder.policy.kind,
        "threshold": _cell(decoder.policy),
        "tokens_per_second": len(tokens) / statistics.median(setting.seconds) if tokens else None,
        "speedup": statistics.median(ratios) if ratios else None,
        "agreement": setting.agreement,
        "accuracy": None,
        "mean_layers": sum(token.exit_layer for token in tokens) / count,
        **shares,
    }


def _cell(policy: Policy) -> float | str | None:
    threshold = policy.threshold
    return " ".join(map(str, threshold)) if isinstance(threshold, list) else threshold


def _now(decoder: Decoder) -> float:
    device = decoder.model.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
