"""Config nodes of task=plan; see `eellm.config.schema`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eellm.config.node import Count, Node, Positive

ScheduleName = Literal["gpipe", "one_f_one_b", "interleaved", "bubble_filling", "zero_bubble_h1"]


class DeviceProfileConfig(Node):
    """A device as task=plan reckons with it."""

    name: str
    half_teraflops: Positive
    """Peak of bf16 and fp16 products, without sparsity."""
    fp32_teraflops: Positive
    """Peak of fp32 products."""
    efficiency: Annotated[float, Field(gt=0.0, le=1.0)]
    """Share of the peak that large products reach; an assumption, unless measured."""
    memory: Positive
    """GiB."""
    reserved: Annotated[float, Field(ge=0.0)]
    """GiB that a run cannot use: the driver's, communication buffers, fragmentation."""
    memory_bandwidth: Positive
    """GB/s."""
    link_bandwidth: Positive
    """GB/s to other devices of the node, one direction."""
    network_bandwidth: Positive
    """GB/s to devices of other nodes, one direction."""
    latency: Annotated[float, Field(ge=0.0)]
    """Microseconds of a message."""
    per_node: Count
    """Devices of a node."""


class PlanConfig(Node):
    gpus: Count | None
    """Devices; null = parallel.tp x pp x dp."""
    schedules: list[ScheduleName]
    """Schedules that are set side by side; `csv` joins them where schedule=csv."""
    search: bool
    """Rank the layouts that fit on these devices."""
    rows: Count
    """Layouts that the ranking shows."""
