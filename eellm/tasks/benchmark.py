"""`task=benchmark`: what exits cost in training and gain in decoding, as ratios measured side by side in one run; writes
benchmark.csv, for decoding speed_quality.csv with its figures, for the planner device_profile.yaml."""

from __future__ import annotations

import sys

import torch
import yaml

from eellm.benchmark.figure import Figure, layout_name
from eellm.benchmark.speed_quality import speed_against_quality
from eellm.config.measured_profile import FILE
from eellm.config.schema import Config, DecodingMode, ExitPolicyConfig
from eellm.data.corpus import Corpus
from eellm.data.tokenizer_files import configured_vocab_size
from eellm.decoding.policy import build_policy
from eellm.decoding.setting import swept
from eellm.engine.chunks import ChunkOptions, build_chunks
from eellm.errors import writing
from eellm.mcore.groups import Groups
from eellm.metrics.tables import TableRow
from eellm.model.spec import ModelSpec
from eellm.model.stage import Stage
from eellm.tasks.comparison import NUM_PROMPTS, PROMPT_TOKENS, held_out_prompts
from eellm.tasks.context import TaskContext
from eellm.tasks.plan import own_program
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording
from eellm.tasks.source import trained_tokenizer
from eellm.tasks.trained import load_trained

SWEEP_REPEATS = 1
"""Of speed against quality, whose many settings take the most time; what counts of it is in benchmark.csv, with intervals."""


def run(context: TaskContext) -> dict[str, float]:
    config = context.config
    with process_group(config) as device, recording(context) as (recorder, final):
        plan = (Plan.of_tuning if config.benchmark.name == "tuning" else Plan.of)(config, vocab_size(config))
        with groups_of(plan, device, config.seed) as groups:
            if config.benchmark.name == "decoding":
                figures, rows = measured_decoding(context, plan, groups)
                if rows:
                    recorder.table("speed_quality", rows)
            elif config.benchmark.name == "tuning":
                figures = measured_tuning(config, plan, groups)
            elif config.benchmark.name == "planner":
                figures = predicted_and_measured(context, plan, groups)
            else:
                figures = measured_training(config, plan, groups)
        name = layout_name(plan.layout)
        recorder.table("benchmark", [figure.row(name) for figure in figures])
        final |= {figure.metric: figure.value for figure in figures if figure.value is not None}
    if is_main_rank():
        title = f"{config.benchmark.name}, {name}, {config.precision.dtype}, {config.benchmark.pairs} pairs"
        show(context, title + exit_words(config, plan.spec), figures)
    return final


def exit_words(config: Config, spec: ModelSpec) -> str:
    """How tokens left early in the figures, for the title."""
    if config.benchmark.name != "decoding" or not spec.exits:
        return ""
    policy = timed_policy(config, spec)
    return f", exits by {policy.kind} {policy.layer if policy.kind == 'fixed_layer' else policy.threshold}"


def measured_training(config: Config, plan: Plan, groups: Groups) -> list[Figure]:
    from eellm.benchmark.training import training_figures
    from eellm.benchmark.variants import build_variants

    return training_figures(build_variants(config, plan.spec, plan.stages, groups), config.benchmark)


def predicted_and_measured(context: TaskContext, plan: Plan, groups: Groups) -> list[Figure]:
    """Writes the profile that the prediction is made of."""
    from eellm.benchmark.planner import build_training, compared

    config = context.config
    figures, profile = compared(config, build_training(config, plan.spec, plan.stages, groups), own_program(config))
    if groups.is_main:
        with writing(context.run_dir / FILE):
            (context.run_dir / FILE).write_text(yaml.safe_dump(profile.model_dump(exclude={"path"}), sort_keys=False))
    return figures


def measured_tuning(config: Config, plan: Plan, groups: Groups) -> list[Figure]:
    from eellm.benchmark.tuning import build_tuning, tuning_figures

    return tuning_figures(build_tuning(config, plan.spec, plan.stages, groups), config.benchmark)


def measured_decoding(context: TaskContext, plan: Plan, groups: Groups) -> tuple[list[Figure], list[TableRow]]:
    """Figures, and speed against quality over all modes and thresholds; over several stages, both of the pipeline."""
    from eellm.benchmark.decoding import Subject, decoding_figures, modes_on
    from eellm.benchmark.generating import prepared_clock
    from eellm.benchmark.paired_timing import CriticalPath
    from eellm.benchmark.stages import stage_figures, works_over

    config, options = context.config, context.config.benchmark
    greedy = config.decoding.model_copy(update={"temperature": 0.0})
    policy = build_policy(timed_policy(config, plan.spec), plan.spec)
    stage, prompts = model_and_prompts(context, plan, groups)
    if plan.layout.pp > 1:
        modes: list[DecodingMode] = ["pipeline"]
        works = works_over(stage, policy, greedy, groups, prompts)
        figures = stage_figures(works, greedy.max_new_tokens, CriticalPath(groups.device), options)
    else:
        modes = modes_on(options.decodings, policy)
        subject = Subject(stage, prompts, policy, modes, config.precision.dtype, greedy, options)
        figures = decoding_figures(subject, prepared_clock(CriticalPath(groups.device)))
    settings = swept(modes, greedy, config.exit_policy, options.thresholds, plan.spec)
    return figures, speed_against_quality(stage, groups, prompts[:NUM_PROMPTS], settings, greedy, SWEEP_REPEATS)


def timed_policy(config: Config, spec: ModelSpec) -> ExitPolicyConfig:
    """The config's policy; random weights are never sure of anything, so they exit in the middle of their exits."""
    policy = config.exit_policy
    active = spec.exit_layers if policy.active is None else policy.active
    if config.checkpoint is not None or policy.kind in ("fixed_layer", "never") or not active:
        return policy
    return policy.model_copy(update={"kind": "fixed_layer", "layer": active[len(active) // 2]})


def model_and_prompts(context: TaskContext, plan: Plan, groups: Groups) -> tuple[Stage, list[list[int]]]:
    """As many prompts as the largest batch, fewer where less text is held out."""
    config, most = context.config, max([NUM_PROMPTS, *context.config.benchmark.batches])
    if config.checkpoint is not None:
        return load_trained(config, plan, groups).stages[0], held_out_prompts(Corpus.load(context.run.corpus), most)
    options = ChunkOptions(config.precision.dtype, config.seed, trainable=False)
    generator = torch.Generator().manual_seed(config.seed)
    prompts = torch.randint(plan.spec.vocab_size, (most, PROMPT_TOKENS), generator=generator)
    return build_chunks(plan.spec, plan.stages, groups, options).stages[0].eval(), prompts.tolist()


def vocab_size(config: Config) -> int:
    """Of the trained model, or of the tokenizer that random weights would have."""
    return configured_vocab_size(config.tokenizer) if config.checkpoint is None else trained_tokenizer(config).vocab_size


def show(context: TaskContext, title: str, figures: list[Figure]) -> None:
    from rich.console import Console

    from eellm.benchmark.table import figures_table, notes
    from eellm.report.figures import save_figures
    from eellm.report.run_record import load_run
    from eellm.report.terminal import location_line, print_speed

    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(figures_table(f"Benchmark: {title}", figures))
    for note in notes(figures):
        console.print(note, style="dim")
    console.print()
    record = load_run(context.run_dir)
    if record.speed_quality:
        save_figures(record, context.run_dir / "figures")
        print_speed(record, console)
    console.print(location_line(context.run_dir), soft_wrap=True)
