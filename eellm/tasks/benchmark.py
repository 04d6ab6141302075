"""`task=benchmark`: what exits cost, as ratios measured side by side in one run; writes benchmark.csv."""

from __future__ import annotations

import sys

from eellm.benchmark.figure import Figure, layout_name
from eellm.config.schema import Config
from eellm.data.tokenizer_files import load_tokenizer
from eellm.mcore.groups import Groups
from eellm.tasks.context import TaskContext
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording


def prepare(context: TaskContext) -> None:
    """Nothing: the tokens are random, so no corpus is needed."""


def run(context: TaskContext) -> dict[str, float]:
    config = context.config
    with process_group(config) as device, recording(context) as (recorder, final):
        plan = Plan.of(config, vocab_size(config))
        with groups_of(plan, device, config.seed) as groups:
            figures = measured(config, plan, groups)
        name = layout_name(plan.layout)
        recorder.table("benchmark", [figure.row(name) for figure in figures])
        final |= {figure.metric: figure.value for figure in figures}
    if is_main_rank():
        show(context, f"{config.benchmark.name}, {name}, {config.benchmark.pairs} pairs", figures)
    return final


def measured(config: Config, plan: Plan, groups: Groups) -> list[Figure]:
    from eellm.benchmark.training import training_figures
    from eellm.benchmark.variants import build_variants

    return training_figures(build_variants(config, plan.spec, plan.stages, groups), config.benchmark)


def vocab_size(config: Config) -> int:
    """The tokenizer's size without a tokenizer where it is to be trained."""
    tokenizer = config.tokenizer
    if tokenizer.kind == "byte_bpe":
        assert tokenizer.vocab_size is not None, "checked with the config"
        return tokenizer.vocab_size
    assert tokenizer.path is not None, "checked with the config"
    return load_tokenizer(tokenizer.path, tokenizer.end_of_document).vocab_size


def show(context: TaskContext, title: str, figures: list[Figure]) -> None:
    from rich.console import Console

    from eellm.benchmark.table import NOTE, figures_table
    from eellm.report.terminal import location_line

    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(figures_table(f"Benchmark: {title}", figures))
    console.print(NOTE, style="dim")
    console.print()
    console.print(location_line(context.run_dir), soft_wrap=True)
