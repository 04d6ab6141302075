"""What needs a GPU, checked and timed in one call: `python -m tests.gpu.check [--only SECTION] [--device cpu]`.

Prints a table per section. On the CPU it shows that the script runs, with less to compare.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eellm.decoding.continuation import Request
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.policy import Policy
from eellm.errors import MissingExtra
from eellm.model.attention import flash_attn, sdpa
from eellm.model.context import AttentionMask
from eellm.model.spec import ExitSpec, ModelSpec
from eellm.model.stage import Stage
from tests.gpu.stages import stage_on

PROMPT = list(range(1, 33))


@dataclass(frozen=True)
class Scale:
    """How much to do: `layers` and `width` of the model, tokens to decode, tokens of whole sequences, repetitions."""

    layers: int
    width: int
    tokens: int
    sequence: int
    repeats: int


SCALES = {"cuda": Scale(24, 1024, 128, 4096, 5), "cpu": Scale(4, 64, 8, 64, 2)}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Median over repetitions, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = now(device)
        work()
        times.append(now(device) - started)
    return statistics.median(times[1:])


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


SECTIONS = {"decoding": decoding, "attention": attention}


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
