"""Runs on forked ranks: the benchmark of decoding on a tiny model, timed by a clock that reads its seconds from a list."""

from __future__ import annotations

from dataclasses import replace

import torch

from eellm.benchmark.decoding import Subject, decoding_figures, transformers_figures
from eellm.benchmark.figure import Figure
from eellm.benchmark.generating import Generating, Prepared
from eellm.benchmark.matrix_products import MatrixProducts
from eellm.benchmark.speculation import Comparison, compare, loss_figures
from eellm.benchmark.transformers_llama import build_llama
from eellm.config.compose import compose
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.policy import Policy, never_exit
from eellm.model.spec import ModelSpec
from tests.decoding.models import build, policy
from tests.decoding.recorded_kernels import Recorder

NEW_TOKENS, PENDING = 12, 3
PROMPTS = [[5, 17, 3], [42, 8, 1, 30, 2], [60]]
SECONDS = {
    "full": [99.0, 4.0, 2.0, 5.0],
    "by_rows": [99.0, 3.0, 1.0, 4.5],
    "products": [99.0, 2.0, 1.0, 1.0],
    "catch_up": [99.0, 2.0, 2.0, 2.0],
    "self_speculative": [99.0, 4.0, 4.0, 4.0],
    "theirs": [99.0, 5.0, 4.0, 6.0],
}
"""Of each work in its rounds; the first one warms up."""


class ListedSeconds:
    """Does the work, and takes the time from the list; a batch takes as long as its sequences one by one."""

    def __init__(self) -> None:
        self.rounds: dict[Prepared, int] = {}

    def __call__(self, work: Prepared) -> float:
        work.begin()
        work()
        number = self.rounds[work] = self.rounds.get(work, -1) + 1
        if isinstance(work, Generating):
            options = work.decoder.options
            return SECONDS[options.mode][number] * options.max_batch
        if isinstance(work, MatrixProducts):
            return SECONDS["by_rows" if work.by_rows else "products"][number]
        return SECONDS["theirs"][number]


def subject(spec: ModelSpec, policy_: Policy, modes: tuple[str, ...]) -> Subject:
    config = compose(["task=benchmark", "benchmark=decoding", "benchmark.pairs=3", "benchmark.batches=[1,2]"])
    decoding = config.decoding.model_copy(update={"max_new_tokens": NEW_TOKENS, "max_pending": PENDING})
    return Subject(build(spec), PROMPTS, policy_, modes, "fp32", decoding, config.benchmark)


def figures_of(rank: int, spec: ModelSpec, policy_: Policy, modes: tuple[str, ...]) -> list[Figure]:
    return decoding_figures(subject(spec, policy_, modes), ListedSeconds())


def llama_figures(rank: int, spec: ModelSpec) -> list[Figure]:
    return transformers_figures(subject(spec, never_exit(spec), ()), ListedSeconds())


def differences(rank: int, spec: ModelSpec) -> dict[str, Comparison]:
    """Full depth against speculation, and against exits that are taken at their word in place of it."""
    stage, eager = build(spec), policy(spec, "max_probability", 0.0)
    full = Generating(Decoder(stage, never_exit(spec), DecoderOptions("full")), PROMPTS, NEW_TOKENS)
    for _ in PROMPTS:
        full.begin()
        full()
    modes = {mode: Decoder(stage, eager, DecoderOptions(mode)) for mode in ("self_speculative", "catch_up")}
    return {mode: compare(full.decoder, decoder, full.passes) for mode, decoder in modes.items()}


def loss_of(rank: int, spec: ModelSpec, policy_: Policy, changed: int) -> list[Figure]:
    """Rows of speculation's loss where `changed` tokens of one of full depth's texts are not those that the model says."""
    stage = build(spec)
    full = Generating(Decoder(stage, never_exit(spec), DecoderOptions("full")), PROMPTS, NEW_TOKENS)
    full.begin()
    full()
    text = full.passes[0].texts[0]
    for place in range(1, changed + 1):
        text[-place] = (text[-place] + 1) % spec.vocab_size
    return loss_figures(full.decoder, stage, policy_, full.passes, "fp32")


def shapes(rank: int, spec: ModelSpec) -> tuple[int, int]:
    """Parameters of our model without exits, and of Llama's with the same shapes."""
    bare = build(replace(spec, exits=()))
    counted = [sum(p.numel() for p in model.parameters()) for model in (bare, build_llama(spec, "fp32", torch.device("cpu")))]
    return counted[0], counted[1]


def captured_products(rank: int, spec: ModelSpec, steps: int) -> tuple[int, int]:
    """How often a step's products are captured and repeated, where graphs are used."""
    recorder = Recorder()
    MatrixProducts(build(spec), steps, recorder.capture)()
    return recorder.captured, recorder.replayed
