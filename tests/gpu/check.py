"""What needs a GPU, checked and timed in one call: `python -m tests.gpu.check [--only SECTION] [--device cpu]`.

Prints a table per section. On the CPU it shows that the script runs, with less to compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from eellm.benchmark.tuning import Tuning, build_tuning, tuning_figures
from eellm.config.compose import compose
from eellm.config.schema import Config
from eellm.decoding.continuation import Request
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.policy import Policy
from eellm.engine.distillation import Distillation
from eellm.engine.tuning import TuningEngine
from eellm.errors import MissingExtra
from eellm.mcore.optimizer import MegatronOptimizer
from eellm.model.attention import flash_attn, sdpa
from eellm.model.context import AttentionMask
from eellm.model.spec import ExitSpec, ModelSpec, build_spec, plan_stages, tied_stages, tuned_spec
from eellm.model.stage import Stage
from eellm.tasks.session import Plan
from tests.gpu.executor import executor
from tests.gpu.stages import groups_on, stage_on
from tests.gpu.timing import SCALES, Scale, seconds, table
from tests.gpu.training import training

PROMPT = list(range(1, 33))


def decoding(device: torch.device, scale: Scale) -> None:
    """Tokens per second by mode and batch with and without graphs, and whether the tokens are the same."""
    exits = (ExitSpec(scale.layers // 4), ExitSpec(scale.layers // 2))
    heads = scale.width // 64
    sizes = {"ffn_hidden_size": 3 * scale.width, "vocab_size": 32000, "padded_vocab_size": 32000, "max_positions": 2048}
    shape = {"num_layers": scale.layers, "hidden_size": scale.width, "num_heads": heads, "num_query_groups": heads}
    spec_ = ModelSpec(head_dim=64, exits=exits, **shape, **sizes)
    for dtype in ("fp32", "bf16"):
        rows = []
        with stage_on(device, spec_, dtype) as stage:
            for mode in ("full", "catch_up", "kv_recompute", "self_speculative"):
                rows += [_decoding_row(stage, mode, batch, scale) for batch in (1, 4)]
        print(f"\ndecoding, {dtype}: {scale.layers} layers of width {scale.width}, random weights, greedy")
        table(["mode", "batch", "eager tokens/s", "graphs tokens/s", "speedup", "same tokens"], rows)


def _decoding_row(stage: Stage, mode: str, batch: int, scale: Scale) -> list[str]:
    # confidences of random weights are low: this threshold makes some tokens leave and others stay
    policy = Policy("max_probability", tuple(stage.spec.exit_layers), (1e-3,) * len(stage.spec.exits), stage.spec.vocab_size)
    decoder = Decoder(stage, policy, DecoderOptions(mode, max_pending=4, draft_length=3, max_batch=batch))
    graphs, device = decoder.runner.graphs, torch.device(decoder.model.device)

    def run() -> list[list[int]]:
        sequences = [decoder.submit([place + number for place in PROMPT], Request(scale.tokens)) for number in range(batch)]
        while decoder.step():
            pass
        return [sequence.ids for sequence in sequences]

    decoder.runner.graphs = None
    eager, texts = seconds(device, run, scale.repeats), run()
    row = [mode, str(batch), f"{batch * scale.tokens / eager:.1f}"]
    if graphs is None:
        return [*row, "-", "-", "-"]
    decoder.runner.graphs = graphs
    captured, own = seconds(device, run, scale.repeats), run()
    same = sum(a == b for first, second in zip(texts, own, strict=True) for a, b in zip(first, second, strict=True))
    total = sum(map(len, texts))
    return [*row, f"{batch * scale.tokens / captured:.1f}", f"{eager / captured:.2f}", f"{same} of {total}"]


def attention(device: torch.device, scale: Scale) -> None:
    """flash_attn against sdpa on whole sequences, forward and backward."""
    dtype = torch.bfloat16
    rows = []
    for groups in (16, 4):
        shapes = [(scale.sequence, 2, heads, 64) for heads in (16, groups, groups)]
        inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
        wanted = sdpa(*inputs, AttentionMask())
        for name, kernel in (("sdpa", sdpa), ("flash_attn", flash_attn)):

            def pass_both_ways(kernel=kernel, inputs=inputs) -> None:
                kernel(*inputs, AttentionMask()).sum().backward()

            try:
                difference = (kernel(*inputs, AttentionMask()) - wanted).abs().max().item()
            except MissingExtra as error:
                rows.append([name, str(groups), f"not here: {error}", "-"])
                continue
            took = seconds(device, pass_both_ways, scale.repeats)
            rows.append([name, str(groups), f"{took * 1e3:.2f}", f"{difference:.1e}"])
    print(f"\nattention, bf16: 2 sequences of {scale.sequence} tokens, 16 heads of 64 channels")
    table(["kernel", "groups", "forward + backward ms", "largest difference to sdpa"], rows)


SMOLLM2 = {"num_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_query_groups": 3, "ffn_hidden_size": 1536}
TUNED = {
    "cuda": (49152, SMOLLM2, {"sequence_length": 1024, "micro_batch_size": 8, "global_batch_size": 16}),
    "cpu": (
        512,
        {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 1},
        {"sequence_length": 32, "micro_batch_size": 1, "global_batch_size": 2},
    ),
}
"""Entries of the vocabulary, model and batch that exits are tuned on."""


def tuning(device: torch.device, scale: Scale) -> None:
    """Exits behind a frozen backbone of random weights: what they learn of one batch, from text and the final head, in bf16; what
    a step costs. Ends with an error where a loss does not fall or the backbone changes."""
    vocabulary, model, data = TUNED[device.type]
    keys = {**{f"model.{key}": value for key, value in model.items()}, **{f"data.{key}": value for key, value in data.items()}}
    asked = ["exits.layers=[0.25,0.5,0.75]", "exits.head=[mlp,norm,block]"]
    fixed = ["task=benchmark", "benchmark=tuning", "precision=bf16", "parallel.dp=1", f"device={device.type}", *asked]
    config = compose(
        [
            *fixed,
            *(f"{key}={value}" for key, value in keys.items()),
            f"benchmark.pairs={scale.repeats}",
            f"tokenizer.vocab_size={vocabulary}",
        ]
    )
    plan = Plan.of_tuning(config, vocabulary)
    with groups_on(device, plan.layout, tied_stages(plan.spec, plan.stages)) as groups:
        built = build_tuning(config, plan.spec, plan.stages, groups)
        costs = tuning_figures(built, config.benchmark)
        rows = _learned("text", built, config)
        whole = tuned_spec(build_spec(config, vocabulary), plan.spec.exit_layers, whole=True)
        taught = build_tuning(config, whole, plan_stages(whole, plan.layout), groups)
        engine = TuningEngine(taught.engine.chunks, taught.engine.options, Distillation(share=0.5, temperature=2.0))
        rows += _learned("final head too", replace(taught, engine=engine), config)
    shape = f"{model['num_layers']} layers of width {model['hidden_size']}"
    print(f"\ntuning, bf16: {shape}, random weights, {STEPS} steps on one batch")
    table(["learns from", "exit", "first loss", "last loss"], rows)
    table(["what", "value", "unit", "target"], [[f.label, f"{f.value:.4g}", f.unit, f"{f.target or '-'}"] for f in costs])


STEPS = 20


def _learned(source: str, tuned: Tuning, config: Config) -> list[list[str]]:
    chunks = tuned.engine.chunks
    exits = [exit_.name for exit_ in chunks.spec.exits]
    options = config.optimizer.model_copy(update={"lr": 3e-3, "weight_decay": 0.0})
    optimizer = MegatronOptimizer(options, config.precision, chunks.wrapped, chunks.config, exits)
    optimizer.set_lr(options.lr)
    frozen = [(weight, weight.clone()) for weight in chunks.stages[0].parameters() if not weight.requires_grad]
    losses = []
    for _ in range(STEPS):
        chunks.zero_grad()
        optimizer.zero_grad()
        losses.append(tuned.engine.run(tuned.batch, tuned.weights).means)
        optimizer.step()
    assert all(torch.equal(weight, before) for weight, before in frozen), "the backbone is not what it was"
    assert all(losses[-1][name] < losses[0][name] for name in exits), (losses[0], losses[-1])
    return [[source, name, f"{losses[0][name]:.4f}", f"{losses[-1][name]:.4f}"] for name in exits]


SECTIONS = {"decoding": decoding, "attention": attention, "tuning": tuning, "training": training, "executor": executor}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    asked = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if asked.device == "cuda" else torch.device("cpu")
    for name, section in SECTIONS.items():
        if asked.only in (None, name):
            section(device, SCALES[asked.device])


if __name__ == "__main__":
    main()
