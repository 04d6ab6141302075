"""Decoding over pipeline stages as work to be timed: exits in a pipeline against full depth on the same ranks.

All ranks do it: the first stage continues prompts, the others follow until every stage is idle. Prompts are timed as well,
for later stages hear of them and of all that follows in one go.
"""

from __future__ import annotations

from collections.abc import Sequence

from eellm.benchmark.figure import TOKENS, Figure, timed
from eellm.benchmark.paired_timing import CriticalPath, alternate, median_interval
from eellm.config.schema import BenchmarkConfig, DecodingConfig, DecodingMode
from eellm.decoding.continuation import Request
from eellm.decoding.decoder import DecoderOptions
from eellm.decoding.pipeline.staged import StagedDecoder
from eellm.decoding.policy import Policy
from eellm.mcore.groups import Groups
from eellm.model.stage import Stage


class StagesAtWork:
    """Work: one prompt continued in one mode, the next one each time. `texts` has what came out, on the first stage."""

    def __init__(self, stage: Stage, policy: Policy, decoding: DecodingConfig, groups: Groups, prompts: Sequence[list[int]]):
        self._staged = StagedDecoder(stage, policy, DecoderOptions.of(decoding), groups)
        self._prompts, self._request = prompts, Request(decoding.max_new_tokens)
        self.texts: list[list[int]] = []
        self._times = 0

    def __call__(self) -> None:
        prompt = self._prompts[self._times % len(self._prompts)]
        self._times += 1
        text = self._staged.lead(lambda decoder: [token.id for token in decoder.generate(prompt, self._request)])
        if text is not None:
            self.texts.append(text)


def stage_figures(
    works: dict[DecodingMode, StagesAtWork], new_tokens: int, clock: CriticalPath, options: BenchmarkConfig
) -> list[Figure]:
    """Called by all ranks; `works` are full depth and the pipeline."""
    seconds = alternate(works, clock.seconds, options.pairs, options.warmup)
    rates = {mode: [new_tokens / each for each in own] for mode, own in seconds.items()}
    ratios = [full / own for full, own in zip(seconds["full"], seconds["pipeline"], strict=True)]
    return [
        timed("stages/full", "full depth, prompt included", TOKENS, median_interval(rates["full"])),
        timed("stages/pipeline", "pipeline, prompt included", TOKENS, median_interval(rates["pipeline"])),
        timed("stages/speedup", "pipeline / full depth", "x", median_interval(ratios)),
    ]


def works_over(
    stage: Stage, policy: Policy, decoding: DecodingConfig, groups: Groups, prompts: Sequence[list[int]]
) -> dict[DecodingMode, StagesAtWork]:
    """Batch 1: what exits gain a single user."""
    modes: tuple[DecodingMode, ...] = ("full", "pipeline")
    single = {mode: decoding.model_copy(update={"mode": mode, "max_batch": 1, "max_tokens": None}) for mode in modes}
    return {mode: StagesAtWork(stage, policy, own, groups, prompts) for mode, own in single.items()}
