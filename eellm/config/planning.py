"""Config nodes of task=plan; see `eellm.config.schema`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eellm.config.node import Count, Node, Positive

ScheduleName = Literal["gpipe", "one_f_one_b", "interleaved", "bubble_filling", "zero_bubble_h1"]


Pass = Annotated[list[Annotated[float, Field(ge=0.0)]], Field(min_length=2, max_length=2)]
"""Seconds of [forward, backward]."""


class TimedPassesConfig(Node):
    """A microbatch on one device, as it was timed there: instead of what peaks and bandwidths say."""

    layer: Pass
    embedding: Pass
    heads: dict[str, Pass]
    """By kind: `final`, `norm`, `mlp, own matrix`, ...; with nothing deferred."""
    setting: dict[str, bool | int | float | str | None]
    """What they depend on: shapes of the model and the microbatch. They say nothing about another."""


class DeviceProfileConfig(Node):
    """A device as task=plan models it, and by whose times stages are balanced."""

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
    path: str | None = None
    """Of `measured`: a run of task=benchmark benchmark=planner, or its device_profile.yaml, which all the rest is taken from."""
    timed: TimedPassesConfig | None = None
    """Passes as they were timed; null = by what the device reaches."""


class PlanConfig(Node):
    task: Literal["train", "tune"]
    """Whose step is planned: training, or tuning exits behind a frozen backbone."""
    gpus: Count | None
    """Devices; null = parallel.tp x pp x dp."""
    schedules: list[ScheduleName]
    """Schedules of training that are set side by side; `csv` joins them where schedule=csv. Tuning goes forward only."""
    search: bool
    """Rank the layouts that fit on these devices."""
    rows: Count
    """Layouts that the ranking shows."""
