"""Ways of taking a sequence's tokens through the model until a head has spoken.

A mode owns the segments and decides which of them a token passes before it is emitted; the decoder owns requests,
sampling and ends. Further ways (recomputing pending tokens, stages that drain in the background, drafts that are
verified) are further classes with the same two methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from eellm.decoding.policy import Policy
from eellm.decoding.queue import SegmentQueue
from eellm.decoding.reading import Reading
from eellm.decoding.segments import InferenceModel


class Mode(Protocol):
    model: InferenceModel

    def prefill(self, queue: SegmentQueue, prompt: Sequence[int]) -> Reading:
        """Take a prompt through all layers; what the final head says about its last token."""
        ...

    def advance(self, queue: SegmentQueue, token: int, generated: int) -> Reading:
        """Take the next token until a head speaks; `generated` tokens have been emitted so far."""
        ...


class CatchUp:
    """Tokens leave at the first exit that the policy trusts; those behind them catch up with the next that goes deeper.

    Each token passes every layer at most once. When `max_pending` tokens wait (None: no bound), the next one passes all
    layers and evaluates no exit. With a policy that has no active exits this is full decoding.
    """

    def __init__(self, model: InferenceModel, policy: Policy, max_pending: int | None):
        self.model, self.policy, self.max_pending = model, policy, max_pending

    def prefill(self, queue: SegmentQueue, prompt: Sequence[int]) -> Reading:
        queue.push(prompt)
        arrivals = [queue.advance(index) for index in range(len(self.model.segments))]
        queue.fill_blocks()
        return queue.read_final(arrivals[-1])

    def advance(self, queue: SegmentQueue, token: int, generated: int) -> Reading:
        may_exit = generated >= self.policy.min_new_tokens and (self.max_pending is None or queue.pending < self.max_pending)
        queue.push([token])
        seen = []
        for index, segment in enumerate(self.model.segments):
            arrival = queue.advance(index)
            if may_exit and segment.exit is not None:
                reading = queue.read_exit(index, arrival)
                seen.append(reading.statistics)
                if self.policy.decide(seen).item():
                    return reading
        return queue.read_final(arrival)
