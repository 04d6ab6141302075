"""Decode steps compiled on the CPU: what is captured as a CUDA graph elsewhere becomes C++ that `torch.compile` writes.

A step's operations are traced once, with the tensors that they read and write; what stands between two products becomes one
loop over a row in place of some ten calls. It pays where layers are small, after a first compilation of seconds to a minute
for each segment, which torch keeps on the disk for the next run.
"""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from eellm.decoding.model.cuda_graphs import Run


def compiled(run: Run) -> Run:
    """A `cuda_graphs.Capture`; what it returns gives a new tensor with every call."""
    traced = make_fx(lambda: run())()
    return torch.compile(traced, fullgraph=True, dynamic=False)
