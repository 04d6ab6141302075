"""How fast tokens come: at full depth against what the machine allows, by each mode against full depth, and in batches.

All times alternate within one run and leave the prompts' pass out, but where `transformers` is compared, whose `generate`
cannot be cut. Tokens are counted as they come out. Every number is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from eellm.benchmark.figure import TOKENS, Figure, not_run, timed
from eellm.benchmark.generating import Clock, Generating, Pass, Prepared, WholeGeneration
from eellm.benchmark.matrix_products import MatrixProducts
from eellm.benchmark.paired_timing import alternate, median_interval
from eellm.benchmark.speculation import loss_figures
from eellm.benchmark.transformers_llama import LlamaGeneration, build_llama, why_not
from eellm.config.schema import BenchmarkConfig, DecodingConfig, DecodingMode
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.policy import Policy, never_exit
from eellm.model.spec import parameters
from eellm.model.stage import Stage

PRODUCTS_TARGET = {"fp32": 0.80, "bf16": 0.65, "fp16": 0.65}
"""Full depth reaches this share of the tokens per second that its matrix products alone would give."""
TRANSFORMERS_TARGET, SMALL_TRANSFORMERS_TARGET = 1.15, 1.5
"""Times the speed of `transformers`; the second for models in which its overhead weighs more."""
SMALL = 20e6
BOUND_TARGET = 0.9
"""Early exit reaches this share of the speed-up that the bytes it reads would give."""
SPECULATION_TARGET = 0.95
BATCHED: tuple[DecodingMode, ...] = ("catch_up", "self_speculative")
"""Modes that are timed in batches, beside full depth."""


@dataclass(frozen=True)
class Subject:
    """A model on this rank's one stage, and how it is decoded; see the config's `benchmark` and `decoding`."""

    stage: Stage
    prompts: Sequence[list[int]]
    policy: Policy
    modes: Sequence[DecodingMode]
    dtype: str
    decoding: DecodingConfig
    options: BenchmarkConfig

    def generating(self, mode: DecodingMode, batch: int = 1) -> Generating:
        """The prompts' continuations in one mode, as work to be timed."""
        options = replace(DecoderOptions.of(self.decoding), mode=mode, max_batch=batch, max_tokens=None)
        policy = never_exit(self.stage.spec) if mode == "full" else self.policy
        decoder = Decoder(self.stage, policy, options)
        return Generating(decoder, self.prompts, self.decoding.max_new_tokens, batch)


@dataclass(frozen=True)
class Timed:
    """What one work did in the rounds that count, and the seconds that it took."""

    passes: list[Pass]
    seconds: list[float]

    @property
    def rates(self) -> list[float]:
        """Tokens per second."""
        return [done.tokens / seconds for done, seconds in zip(self.passes, self.seconds, strict=True)]

    @property
    def bytes_per_token(self) -> list[float]:
        return [done.weight_bytes / done.tokens for done in self.passes]


def modes_on(wanted: Sequence[DecodingMode], policy: Policy) -> list[DecodingMode]:
    """The wanted modes that one stage can run, full depth left out; none of them without exits to ask."""
    runnable: tuple[DecodingMode, ...] = ("catch_up", "kv_recompute", "self_speculative")
    return [mode for mode in runnable if mode in wanted and policy.active]


def decoding_figures(subject: Subject, clock: Clock) -> list[Figure]:
    """Called by all ranks of the layout."""
    works = {mode: subject.generating(mode) for mode in ("full", *subject.modes)}
    steps, options = subject.decoding.max_new_tokens - 1, subject.options
    products = {"products": MatrixProducts(subject.stage, steps), "by_rows": MatrixProducts(subject.stage, steps, by_rows=True)}
    seconds = alternate({**works, **products}, clock, options.pairs, options.warmup)
    results = {mode: Timed(work.passes[-options.pairs :], seconds[mode]) for mode, work in works.items()}
    full = results["full"]
    figures = full_figures(full, seconds, subject.dtype) + transformers_figures(subject, clock)
    for mode in subject.modes:
        figures += mode_figures(mode, full, results[mode])
        if mode == "self_speculative":
            figures += loss_figures(works["full"].decoder, subject.stage, subject.policy, full.passes, subject.dtype)
    return figures + batch_figures(subject, results, clock)


def full_figures(full: Timed, seconds: Mapping[str, Sequence[float]], dtype: str) -> list[Figure]:
    """`seconds`: of the same steps' matrix products, as decoding stores the matrices (`products`) and `by_rows`.

    The target is a share of the latter, which any PyTorch program has; the former is what remains to be gained.
    """
    limits = {
        work: [done.tokens / taken for done, taken in zip(full.passes, seconds[work], strict=True)]
        for work in ("products", "by_rows")
    }
    shares = {work: median_interval(_ratios(full.rates, limit)) for work, limit in limits.items()}
    target = PRODUCTS_TARGET[dtype]
    return [
        timed("full/speed", "full depth", TOKENS, median_interval(full.rates)),
        timed("full/by_rows", "products of torch.nn.Linear", TOKENS, median_interval(limits["by_rows"])),
        timed("full/of_by_rows", "full depth / these", "x", shares["by_rows"], target, True),
        timed("full/products", "products as stored", TOKENS, median_interval(limits["products"])),
        timed("full/of_products", "full depth / these", "x", shares["products"]),
    ]


def mode_figures(mode: DecodingMode, full: Timed, own: Timed) -> list[Figure]:
    """A mode against full depth: its speed-up, and what of it the bytes promise where tokens pass fewer weights."""
    speedups = _ratios(own.rates, full.rates)
    if mode != "catch_up":
        target = SPECULATION_TARGET if mode == "self_speculative" else None
        return [timed(f"{mode}/speedup", f"{mode} / full depth", "x", median_interval(speedups), target, True)]
    bounds = _ratios(full.bytes_per_token, own.bytes_per_token)
    return [
        timed(f"{mode}/speedup", f"{mode} / full depth", "x", median_interval(speedups)),
        timed(f"{mode}/bound", "bytes per token, full / catch_up", "x", median_interval(bounds)),
        timed(f"{mode}/of_bound", "speed-up / bytes", "x", median_interval(_ratios(speedups, bounds)), BOUND_TARGET, True),
    ]


def transformers_figures(subject: Subject, clock: Clock) -> list[Figure]:
    """The same shapes, prompts and numbers of tokens in `transformers`; both times include the prompts' pass."""
    spec, options, new_tokens = subject.stage.spec, subject.options, subject.decoding.max_new_tokens
    small = parameters(replace(spec, exits=())) < SMALL
    target = SMALL_TRANSFORMERS_TARGET if small else TRANSFORMERS_TARGET
    ratio = Figure("full/over_transformers", "full depth / transformers", "x", None, target=target, at_least=True)
    reason = why_not(spec, subject.stage.config.tensor_model_parallel_size)
    if reason is not None:
        return [not_run(ratio, reason)]
    decoder = subject.generating("full").decoder
    works: dict[str, Prepared] = {
        "ours": WholeGeneration(decoder, subject.prompts, new_tokens),
        "theirs": LlamaGeneration(build_llama(spec, subject.dtype, decoder.model.device), subject.prompts, new_tokens),
    }
    seconds = alternate(works, clock, options.pairs, options.warmup)
    theirs = median_interval([new_tokens / taken for taken in seconds["theirs"]])
    interval = median_interval(_ratios(seconds["theirs"], seconds["ours"]))
    return [
        timed("full/transformers", "transformers, prompt included", TOKENS, theirs),
        replace(ratio, value=interval.median, interval=interval),
    ]


def batch_figures(subject: Subject, singles: Mapping[DecodingMode, Timed], clock: Clock) -> list[Figure]:
    """Tokens per second of all sequences together; `singles` has what one at a time makes."""
    modes = [mode for mode in ("full", *BATCHED) if mode in singles]
    figures = []
    for batch in subject.options.batches:
        results = singles if batch == 1 else _timed_batch(subject, modes, batch, clock)
        for mode in modes:
            label = f"{'full depth' if mode == 'full' else mode}, batch {batch}"
            figures.append(timed(f"batch_{batch}/{mode}", label, TOKENS, median_interval(results[mode].rates)))
    return figures


def _timed_batch(subject: Subject, modes: list[DecodingMode], batch: int, clock: Clock) -> dict[DecodingMode, Timed]:
    works = {mode: subject.generating(mode, batch) for mode in modes}
    seconds = alternate(works, clock, subject.options.pairs, subject.options.warmup)
    return {mode: Timed(work.passes[-subject.options.pairs :], seconds[mode]) for mode, work in works.items()}


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [above / below for above, below in zip(numerators, denominators, strict=True)]
