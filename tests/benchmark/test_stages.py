"""The pipeline against full depth: which work is timed, and the arithmetic of its figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from eellm.benchmark.stages import stage_figures, works_over
from eellm.config.compose import compose
from eellm.decoding.continuation import Request
from eellm.decoding.decoder import DecoderOptions
from tests import workers
from tests.decoding.models import Job, decode_all, policy, spec
from tests.decoding.pipelines import Cut, build

PROMPTS = [(5, 17, 3), (22, 8)]
NEW_TOKENS = 7
SPEC = spec()
EAGER = policy(SPEC, "max_probability", 0.3)


@dataclass
class ScriptedClock:
    """Says how long each work took, and does it."""

    script: list[float]
    done: list[Callable] = field(default_factory=list)

    def seconds(self, work: Callable) -> float:
        self.done.append(work)
        work()
        return self.script[len(self.done) - 1]


def texts_over_two_stages(rank: int) -> dict[str, list[list[int]]]:
    stage, groups = build(SPEC, Cut(pp=2))
    decoding = compose(["task=generate", f"decoding.max_new_tokens={NEW_TOKENS}"]).decoding
    works = works_over(stage, EAGER, decoding, groups, [list(prompt) for prompt in PROMPTS])
    for _ in range(3):  # in turns, as they are timed
        for work in works.values():
            work()
    return {mode: work.texts for mode, work in works.items()}


@pytest.mark.dist
def test_every_turn_makes_whole_texts_of_the_next_prompt() -> None:
    first, later = workers.run(2, texts_over_two_stages)
    assert later == {"full": [], "pipeline": []}
    for mode, alone in (("full", "full"), ("pipeline", "catch_up")):
        jobs = [Job(SPEC, EAGER, Request(NEW_TOKENS), DecoderOptions(alone), prompt) for prompt in PROMPTS]
        wanted = [[token.id for token in outcome.tokens] for outcome in workers.run(1, decode_all, jobs)[0]]
        assert first[mode] == [*wanted, wanted[0]]
    assert first["full"] != first["pipeline"]


def test_rates_count_the_tokens_made_and_the_ratio_is_of_times() -> None:
    options = compose(["task=benchmark", "benchmark=decoding", "benchmark.pairs=3", "benchmark.warmup=1"]).benchmark
    # the order turns round from round to round: the warm-up's is pipeline, full
    clock = ScriptedClock([99.0, 99.0, 4.0, 2.0, 1.5, 6.0, 5.0, 2.5])
    works = {"full": lambda: None, "pipeline": lambda: None}
    full, pipeline, speedup = stage_figures(works, 12, clock, options)
    assert [work is works["full"] for work in clock.done] == [False, True, True, False, False, True, True, False]
    assert full.value == pytest.approx(12 / statistics.median([4.0, 6.0, 5.0]))
    assert pipeline.value == pytest.approx(12 / statistics.median([2.0, 1.5, 2.5]))
    assert speedup.value == pytest.approx(statistics.median([4.0 / 2.0, 6.0 / 1.5, 5.0 / 2.5]))
