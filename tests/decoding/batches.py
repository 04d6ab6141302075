"""Runs on forked ranks: many requests through one decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace

from eellm.decoding.continuation import Request, Token
from eellm.decoding.counters import Counters
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.policy import Policy
from eellm.model.spec import ModelSpec
from eellm.model.stage import Stage
from tests.decoding.models import build


@dataclass(frozen=True)
class Batch:
    """Requests in order of arrival. `arrivals` says after how many steps each one is submitted; None: all at once."""

    spec: ModelSpec
    policy: Policy
    options: DecoderOptions
    requests: list[tuple[tuple[int, ...], Request]]
    arrivals: list[int] | None = None
    tp: int = 1
    dtype: str = "fp32"

    def of(self, **options: int | None) -> Batch:
        """The same with other options."""
        return replace(self, options=replace(self.options, **options))


@dataclass(frozen=True)
class Served:
    """What each request got, why it ended, the most sequences that ran at a time, and the cost."""

    tokens: list[list[Token]]
    ends: list[str | None]
    most: int
    steps: Counters


def decode_batches(rank: int, batches: list[Batch]) -> list[Served]:
    """Batches that share one model."""
    first = batches[0]
    stage = build(first.spec, first.tp, first.dtype)
    return [serve(stage, batch) for batch in batches]


def serve(stage: Stage, batch: Batch) -> Served:
    decoder = Decoder(stage, batch.policy, batch.options)
    arrivals = batch.arrivals or [0] * len(batch.requests)
    sequences, most, number = {}, 0, 0
    while len(sequences) < len(batch.requests) or any(sequence.end is None for sequence in sequences.values()):
        for place, (prompt, request) in enumerate(batch.requests):
            if place not in sequences and arrivals[place] <= number:
                sequences[place] = decoder.submit(prompt, request)
        emitted = decoder.step()
        assert {id(sequence) for sequence, _ in emitted} == {id(sequence) for sequence in decoder.running if sequence.entered}
        most, number = max(most, len(decoder.running)), number + 1
    ordered = [sequences[place] for place in range(len(batch.requests))]
    return Served([sequence.tokens for sequence in ordered], [sequence.end for sequence in ordered], most, decoder.steps)
