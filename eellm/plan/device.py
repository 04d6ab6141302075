"""A device as the cost model sees it, and how its neighbours are reached."""

from __future__ import annotations

from dataclasses import dataclass

from eellm.config.planning import DeviceProfileConfig, TimedPassesConfig
from eellm.layout import ParallelLayout

_GIB = 1024**3


@dataclass(frozen=True)
class Device:
    """FLOP/s that products reach, bytes/s of memory and links, bytes that a run may use. `timed`: passes as they were
    measured."""

    name: str
    flops: float
    memory_bandwidth: float
    usable_bytes: float
    link_bandwidth: float
    network_bandwidth: float
    latency: float
    per_node: int
    timed: TimedPassesConfig | None = None

    @classmethod
    def of(cls, profile: DeviceProfileConfig, dtype: str) -> Device:
        peak = profile.fp32_teraflops if dtype == "fp32" else profile.half_teraflops
        return cls(
            name=profile.name,
            flops=peak * 1e12 * profile.efficiency,
            memory_bandwidth=profile.memory_bandwidth * 1e9,
            usable_bytes=(profile.memory - profile.reserved) * _GIB,
            link_bandwidth=profile.link_bandwidth * 1e9,
            network_bandwidth=profile.network_bandwidth * 1e9,
            latency=profile.latency * 1e-6,
            per_node=profile.per_node,
            timed=profile.timed,
        )

    def bandwidth_over(self, ranks: int) -> float:
        """Of a group whose ranks lie within so many neighbouring ones: over links if they fit into a node."""
        return self.link_bandwidth if ranks <= self.per_node else self.network_bandwidth

    def all_reduce(self, size: float, count: int, span: int) -> float:
        """Seconds of an all-reduce of `size` bytes over `count` ranks within `span` (ring; half of it is a reduce-scatter or an
        all-gather)."""
        if count <= 1:
            return 0.0
        return 2 * (count - 1) * (size / count / self.bandwidth_over(span) + self.latency)

    def hop(self, layout: ParallelLayout) -> float:
        """Bandwidth to the next pipeline stage, tp x dp ranks away."""
        whole = layout.tp * layout.dp * layout.pp
        return self.bandwidth_over(whole)
