"""`task=generate`: continue prompts with a trained model, every token marked with the exit that emitted it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.generation import Generation, generate_text
from eellm.decoding.policy import build_policy
from eellm.model.stage import Stage
from eellm.tasks.context import TaskContext
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording
from eellm.tasks.trained import load_trained, trained_tokenizer


def prepare(context: TaskContext) -> None:
    """Nothing: the prompts come with the config."""


def run(context: TaskContext) -> dict[str, float]:
    with process_group(context.config) as device, recording(context) as (_, final):
        generations = list(generate(context, device))
        final["generate/tokens_per_second"] = tokens_per_second(generations)
    if is_main_rank():
        from eellm.report.html import build_report
        from eellm.report.terminal import print_report

        write_generations(context, generations)
        build_report(context.run_dir)
        print_report(context.run_dir)
    return final


def generate(context: TaskContext, device: torch.device) -> Iterator[Generation]:
    """Continue `decoding.prompts` with the checkpoint's model; all tensor-parallel ranks get the same."""
    config = context.config
    tokenizer = trained_tokenizer(config)
    plan = Plan.of(config, tokenizer.vocab_size)
    with groups_of(plan, device, config.seed) as groups:
        stage = load_trained(config, plan, groups).stages[0]
        yield from continue_prompts(context, stage)


def continue_prompts(context: TaskContext, stage: Stage) -> Iterator[Generation]:
    config, tokenizer = context.config, trained_tokenizer(context.config)
    options = DecoderOptions(config.decoding.mode, config.decoding.max_pending)
    decoder = Decoder(stage, build_policy(config.exit_policy, stage.spec), options)
    for number, prompt in enumerate(config.decoding.prompts):
        yield generate_text(decoder, tokenizer, prompt, config.decoding, config.seed + number)


def tokens_per_second(generations: list[Generation]) -> float:
    """Generated tokens over seconds, prefill included."""
    return sum(len(generation.tokens) for generation in generations) / max(sum(g.seconds for g in generations), 1e-9)


def write_generations(context: TaskContext, generations: list[Generation]) -> None:
    with (context.run_dir / "generations.jsonl").open("w", encoding="utf-8") as file:
        for generation in generations:
            file.write(json.dumps(generation.as_row(), ensure_ascii=False) + "\n")
