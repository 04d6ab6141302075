"""The parallel layout as arithmetic: which rank does what, without a process group.

Ranks are numbered as megatron-core numbers them: tensor parallel fastest, then data, then pipeline.
A *virtual stage* is one model chunk; chunk v of pipeline rank p is virtual stage v * pp + p.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of a run. `micro_batch_size` and `global_batch_size` count sequences."""

    tp: int = 1
    pp: int = 1
    vp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    global_batch_size: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def num_stages(self) -> int:
        """Virtual stages, first to last."""
        return self.pp * self.vp

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one data-parallel rank in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    def rank(self, tp_rank: int, dp_rank: int, pp_rank: int) -> int:
        return tp_rank + self.tp * (dp_rank + self.dp * pp_rank)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp_rank, dp_rank, pp_rank) of a global rank."""
        return rank % self.tp, rank // self.tp % self.dp, rank // (self.tp * self.dp)

    def stages_of(self, pp_rank: int) -> list[int]:
        """Virtual stages held by a pipeline rank, in chunk order."""
        return [chunk * self.pp + pp_rank for chunk in range(self.vp)]

    def pp_rank_of(self, stage: int) -> int:
        return stage % self.pp

    def groups_over(self, pp_ranks: list[int]) -> list[list[int]]:
        """One sorted list of global ranks per (tp, dp) coordinate: the holders of pipeline-wide copies."""
        return [
            sorted(self.rank(tp_rank, dp_rank, pp_rank) for pp_rank in pp_ranks)
            for dp_rank in range(self.dp)
            for tp_rank in range(self.tp)
        ]


def equal_split(num_layers: int, num_stages: int) -> list[int]:
    """Layers per virtual stage; where they do not divide, as equal as possible, the first stages having one more."""
    return [len(range(stage, num_layers, num_stages)) for stage in range(num_stages)]
