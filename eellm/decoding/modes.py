"""Ways of taking sequences' tokens through the model until heads have spoken.

A mode decides which segments a token passes before it is emitted; the decoder owns slots and requests. What takes part:
`SegmentRunner` runs segments, `leave_early` asks the sequences' policies at each exit. The mode of a stage that does not hold
the whole model is in `eellm.decoding.pipeline.mode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from eellm.decoding.continuation import Continuation, Token
from eellm.decoding.policy import Policy
from eellm.decoding.queue import SegmentQueue, SegmentRunner
from eellm.decoding.reading import Reading, select
from eellm.model.statistics import HeadStatistics

Emitted = list[tuple[Continuation, Token]]


class Mode(Protocol):
    runner: SegmentRunner

    def prefill(self, sequences: Sequence[Continuation], ends: Sequence[int]) -> Emitted:
        """Take prompts, each up to its token `end`, through all layers and blocks. Of those that are whole then the final head
        says the first tokens, here or in a later `advance`."""
        ...

    def advance(self, sequences: Sequence[Continuation]) -> Emitted:
        """Emit next tokens of the sequences that run, `sequences` and those whose first tokens are still to come."""
        ...

    def drain(self, sequences: Sequence[Continuation]) -> None:
        """Return when the KV cache is complete."""
        ...

    def close(self) -> None:
        """There is nothing more to decode."""
        ...


class WholeModel:
    """What modes share whose stage holds the whole model: a prompt's first token comes with its pass."""

    def __init__(self, runner: SegmentRunner):
        self.runner = runner

    def prefill(self, sequences: Sequence[Continuation], ends: Sequence[int]) -> Emitted:
        runner, queues = self.runner, [sequence.queue for sequence in sequences]
        runner.push(queues, [sequence.ids[:end] for sequence, end in zip(sequences, ends, strict=True)])
        runner.finish(queues)
        runner.fill_blocks(queues)
        whole = [sequence for sequence in sequences if sequence.entered]
        if not whole:
            return []
        reading = runner.read_final([sequence.queue for sequence in whole])
        return [(sequence, sequence.emit_from(reading.at(row))) for row, sequence in enumerate(whole)]

    def drain(self, sequences: Sequence[Continuation]) -> None:
        self.runner.drain([sequence.queue for sequence in sequences])

    def close(self) -> None:
        """No other rank waits."""


def leave_early(
    runner: SegmentRunner, policies: Sequence[Policy | None], queues: Sequence[SegmentQueue], segments: int
) -> list[Reading | None]:
    """Take what waits through the first `segments` segments; a queue leaves where its policy, if it has one, trusts the exit.

    Returns what was said there; None for queues that have passed all of these segments.
    """
    said: list[Reading | None] = [None] * len(queues)
    going = list(range(len(queues)))
    seen: dict[Policy, list[HeadStatistics]] = {policy: [] for policy in policies if policy is not None}  # of those that go on
    for index in range(segments):
        runner.advance([queues[number] for number in going], index)
        exit_ = runner.model.segments[index].exit
        asking = {} if exit_ is None else _asking(policies, going, exit_.head.layer)
        if not asking:
            continue
        reading = runner.read_exit([queues[number] for numbers in asking.values() for number in numbers], index)
        first = 0
        for policy, numbers in asking.items():
            end = first + len(numbers)
            seen[policy].append(reading.statistics if len(asking) == 1 else select(reading.statistics, slice(first, end)))
            leaving = policy.decide(seen[policy])
            rows = leaving.tolist()
            if any(rows):
                for row, number in enumerate(numbers):
                    said[number] = reading.at(first + row) if rows[row] else None
                if not all(rows):  # of those that have left nothing is asked again
                    staying = (~leaving).nonzero().squeeze(1)
                    seen[policy] = [select(statistics, staying) for statistics in seen[policy]]
            first = end
        going = [number for number in going if said[number] is None]
        if not going:
            break
    return said


def _asking(policies: Sequence[Policy | None], going: Sequence[int], layer: int) -> dict[Policy, list[int]]:
    """Of the queues that go on, those that ask the exit after a layer, by policy."""
    asking: dict[Policy, list[int]] = {}
    for number in going:
        policy = policies[number]
        if policy is not None and layer in policy.active:
            asking.setdefault(policy, []).append(number)
    return asking


class CatchUp(WholeModel):
    """Tokens leave at the first exit that the policy trusts; those behind them catch up with the next that goes deeper.

    Each token passes every layer at most once. When `max_pending` tokens wait (None: no bound), the next one passes all
    layers and evaluates no exit. With policies that have no active exits this is full decoding.
    """

    def __init__(self, runner: SegmentRunner, max_pending: int | None):
        super().__init__(runner)
        self.max_pending = max_pending

    def advance(self, sequences: Sequence[Continuation]) -> Emitted:
        runner, queues = self.runner, [sequence.queue for sequence in sequences]
        policies = [sequence.policy if self._may_exit(sequence) else None for sequence in sequences]
        self._make_ready(queues)
        runner.push(queues, [sequence.ids for sequence in sequences])
        said = leave_early(runner, policies, queues, len(runner.model.segments))
        deep = [number for number, reading in enumerate(said) if reading is None]
        if deep:
            final = runner.read_final([queues[number] for number in deep])
            for row, number in enumerate(deep):
                said[number] = final.at(row)
        return [(sequence, sequence.emit_from(reading)) for sequence, reading in zip(sequences, said, strict=True) if reading]

    def _may_exit(self, sequence: Continuation) -> bool:
        if not sequence.policy.active or len(sequence.tokens) < sequence.policy.min_new_tokens:
            return False
        return self.max_pending is None or sequence.queue.pending < self.max_pending

    def _make_ready(self, queues: Sequence[SegmentQueue]) -> None:
        """Pending states wait where they are."""


class RecomputeKV(CatchUp):
    """EE-LLM's KV recomputation (arXiv 2312.04916, section 4.2), for comparison: pending tokens start over.

    They pass the early layers again, in one forward with the next token, and their keys and values are written anew.
    """

    def _make_ready(self, queues: Sequence[SegmentQueue]) -> None:
        for queue in queues:
            queue.truncate(queue.complete)
