"""The executor of programs against megatron-core's 1F1B on two ranks: the same gradients, over NCCL on two GPUs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from eellm.data.batch import GlobalBatch
from eellm.engine.chunks import ChunkOptions, build_chunks
from eellm.engine.executor import ProgramEngine
from eellm.engine.megatron import MegatronEngine
from eellm.engine.schedules import pipeline_schedule
from eellm.layout import ParallelLayout
from eellm.mcore.groups import destroy_groups, init_groups
from eellm.model.objective import HeadWeights, ObjectiveOptions
from eellm.model.spec import ExitSpec, ModelSpec, plan_stages, tied_stages
from tests.gpu.stages import SEED
from tests.gpu.timing import Scale, seconds, table

MICROBATCHES = 8


def executor(device: torch.device, scale: Scale) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        print("\nexecutor: not run, it needs two GPUs and there is one")
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(compare, (device.type, scale, folder), nprocs=2)
        rows = [(Path(folder) / f"rank_{rank}").read_text().split("\t") for rank in range(2)]
    backend = "NCCL" if device.type == "cuda" else "gloo"
    print(f"\nexecutor, two stages over {backend}: {scale.layers} layers of width {scale.width}, {MICROBATCHES} microbatches")
    table(["rank", "megatron-core ms", "executor ms", "ratio", "largest difference of gradients"], rows)


def compare(rank: int, kind: str, scale: Scale, folder: str) -> None:
    """On each of two ranks; writes its row into the folder."""
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layout = ParallelLayout(pp=2, global_batch_size=MICROBATCHES)
    heads, exits = scale.width // 32, (ExitSpec(scale.layers // 4), ExitSpec(scale.layers // 2))
    spec = ModelSpec(scale.layers, scale.width, heads, heads, 32, 3 * scale.width, 1000, 1024, scale.sequence, exits)
    plan = plan_stages(spec, layout)
    groups = init_groups(layout, device, tied_stages(spec, plan))
    chunks = build_chunks(spec, plan, groups, ChunkOptions("bf16" if kind == "cuda" else "fp32", SEED))
    tokens = torch.randint(1000, (MICROBATCHES, 1, scale.sequence), generator=torch.Generator().manual_seed(SEED))
    positions = torch.arange(scale.sequence).expand(MICROBATCHES, 1, -1)
    batch = GlobalBatch(tokens, tokens, torch.ones(tokens.shape), positions).to(device)
    weights = HeadWeights(dict.fromkeys(spec.heads, 1.0))
    engines = {
        "megatron": MegatronEngine(chunks, ObjectiveOptions()),
        "executor": ProgramEngine(chunks, ObjectiveOptions(), pipeline_schedule(layout)),
    }
    times, gradients = {}, {}
    for name, engine in engines.items():
        chunks.zero_grad()
        engine.run(batch, weights)
        gradients[name] = torch.cat([parameter.main_grad.flatten() for parameter in chunks.stages[0].parameters()])
        times[name] = seconds(device, lambda engine=engine: engine.run(batch, weights), scale.repeats)
    difference = (gradients["executor"] - gradients["megatron"]).abs().max() / gradients["megatron"].abs().max()
    cells = [str(rank), *(f"{took * 1e3:.2f}" for took in times.values()), f"{times['executor'] / times['megatron']:.3f}"]
    (Path(folder) / f"rank_{rank}").write_text("\t".join([*cells, f"{float(difference):.1e}"]))
    dist.barrier()
    destroy_groups()
