"""`task=generate`: continue prompts with a trained model, every token marked with the exit that emitted it."""

from __future__ import annotations

import json
import time
from functools import partial

import torch

from eellm.calibration.result import calibrated
from eellm.data.tokenizer import Tokenizer
from eellm.decoding.counters import Counters
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.generation import Generation, generate_texts
from eellm.decoding.pipeline.staged import StagedDecoder
from eellm.decoding.policy import build_policy
from eellm.metrics import names
from eellm.model.stage import Stage
from eellm.tasks.context import TaskContext
from eellm.tasks.reporting import report
from eellm.tasks.session import Plan, groups_of, is_main_rank, process_group, recording
from eellm.tasks.source import trained_tokenizer
from eellm.tasks.trained import load_trained


def run(context: TaskContext) -> dict[str, float]:
    with recording(context) as (recorder, final):
        with process_group(context.config) as device:
            generations = generate(context, device, final)
        if is_main_rank():
            write_generations(context, generations)
            report(context, recorder)
    return final


def generate(context: TaskContext, device: torch.device, final: dict[str, float]) -> list[Generation]:
    """Continue `decoding.prompts` with the checkpoint's model, and add how that went to `final`.

    All tensor-parallel ranks of the first stage get the same tokens, later stages nothing.
    """
    config = context.config
    tokenizer = trained_tokenizer(config)
    plan = Plan.of(config, tokenizer.vocab_size)
    with groups_of(plan, device, config.seed) as groups:
        stage = load_trained(config, plan, groups).stages[0]
        policy, options = build_policy(calibrated(config.exit_policy), stage.spec), DecoderOptions.of(config.decoding)
        made = StagedDecoder(stage, policy, options, groups).lead(partial(timed_texts, context, tokenizer))
    if made is None:
        return []
    generations, metrics = made
    final |= metrics
    return generations


def timed_texts(context: TaskContext, tokenizer: Tokenizer, decoder: Decoder) -> tuple[list[Generation], dict[str, float]]:
    """The continuations of `decoding.prompts`, and metrics of how that went."""
    config, started = context.config, time.perf_counter()
    generations = generate_texts(decoder, tokenizer, config.decoding.prompts, config.decoding, config.seed)
    seconds = time.perf_counter() - started
    tokens = sum(len(generation.tokens) for generation in generations)
    speed = tokens / max(seconds, 1e-9)  # all prompts together, prefill included
    return generations, {names.GENERATE_TOKENS_PER_SECOND: speed, **speculation(decoder.steps)}


def continue_prompts(context: TaskContext, stage: Stage) -> list[Generation]:
    """Continue `decoding.prompts` with a model that is there already."""
    config = context.config
    policy = build_policy(calibrated(config.exit_policy), stage.spec)
    decoder, tokenizer = Decoder(stage, policy, DecoderOptions.of(config.decoding)), trained_tokenizer(config)
    return generate_texts(decoder, tokenizer, config.decoding.prompts, config.decoding, config.seed)


def speculation(counters: Counters) -> dict[str, float]:
    """Metrics of drafts; none where nothing was drafted."""
    values = {
        names.GENERATE_ACCEPTANCE_RATE: counters.acceptance_rate,
        names.GENERATE_MEAN_ACCEPTED_LENGTH: counters.mean_accepted_length,
    }
    return {name: value for name, value in values.items() if value is not None}


def write_generations(context: TaskContext, generations: list[Generation]) -> None:
    with (context.run_dir / "generations.jsonl").open("w", encoding="utf-8") as file:
        for generation in generations:
            file.write(json.dumps(generation.as_row(), ensure_ascii=False) + "\n")
