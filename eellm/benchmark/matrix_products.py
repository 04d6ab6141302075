"""The floor under full-depth decoding: every weight matrix of a step times one vector, and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from eellm.decoding.model.cuda_graphs import Capture, Run, cuda_capture
from eellm.model.stage import Stage


def step_matrices(stage: Stage) -> list[torch.Tensor]:
    """Matrices [out, in] that a token at full depth is multiplied with on this rank, in order; the output matrix last.

    The embedding is looked up, not multiplied; rows that pad the vocabulary and the exits take no part.
    """
    readout = stage.readout("final")
    return [*(weight for weight in stage.layers.parameters() if weight.dim() == 2), readout.weight[: readout.vocabulary.rows]]


class MatrixProducts:
    """Work: as many steps' products, at the model's dtype; replayed from a graph where full depth's steps are."""

    @torch.inference_mode()
    def __init__(self, stage: Stage, steps: int, capture: Capture | None = None, by_rows: bool = False):
        """`by_rows`: of copies that stand in memory as torch.nn.Linear keeps them, whatever decoding does with the model's."""
        self.steps, self.matrices, self.by_rows = steps, step_matrices(stage), by_rows
        if by_rows:
            self.matrices = [weight.contiguous() for weight in self.matrices]
        self._vectors = {weight.shape[1]: torch.randn_like(weight[:1]) for weight in self.matrices}
        self._step: Run = (capture or _capture_of(stage, self.matrices[-1].device))(self._products)

    def begin(self) -> None:
        """Nothing comes before it."""

    @torch.inference_mode()
    def __call__(self) -> None:
        for _ in range(self.steps):
            self._step()

    def _products(self) -> torch.Tensor:
        for weight in self.matrices:
            out = F.linear(self._vectors[weight.shape[1]], weight)
        return out


def _capture_of(stage: Stage, device: torch.device) -> Capture:
    """As the decoder does it: graphs on CUDA, but not of tensor-parallel models; elsewhere every step runs by itself."""
    graphs = device.type == "cuda" and stage.vocabulary.group.size() == 1
    return cuda_capture if graphs else lambda run: run
