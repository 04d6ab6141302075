"""A later stage of a pipeline: it does what the messages say, in their order, until told to end."""

from __future__ import annotations

import torch

from eellm.decoding.counters import Counters
from eellm.decoding.decoder import DecoderOptions, effective_policy, links_between
from eellm.decoding.model.kv_cache import KVCache
from eellm.decoding.model.memory import check_fits
from eellm.decoding.model.segments import InferenceModel
from eellm.decoding.pipeline.messages import Kind, Message
from eellm.decoding.pipeline.stage import PipelineStage
from eellm.decoding.policy import Policy
from eellm.decoding.queue import SegmentQueue, SegmentRunner
from eellm.mcore.groups import Groups
from eellm.model.stage import Stage


class Follower:
    """Made with the policy and options of the first stage's `Decoder`.

    `prefill` and `steps` count what prompts and later tokens cost this stage; tokens themselves are counted on the first.
    """

    def __init__(self, stage: Stage, policy: Policy, options: DecoderOptions, groups: Groups):
        self.options = options
        policy = effective_policy(policy, options, stage.spec)
        self.runner = SegmentRunner(InferenceModel(stage, policy.active), options.compile)
        self.links = links_between(groups, self.runner.model, policy, options)
        self.prefill, self.steps = Counters(), Counters()
        self.kv: KVCache | None = None
        self._stage = PipelineStage(self.runner, self.links)
        self._queues: dict[int, SegmentQueue] = {}

    @torch.inference_mode()
    def follow(self) -> None:
        """Serve until the first stage's decoder is closed."""
        while True:
            message = self.links.receive()
            if message.kind in (Kind.prefill, Kind.step):
                self._take(message)
                continue
            if not self.links.is_last:
                self.links.send(message)
            if message.kind == Kind.end:
                self.links.finish()
                return
            self.links.meet()

    def _take(self, message: Message) -> None:
        self.runner.counters = self.prefill if message.kind == Kind.prefill else self.steps
        assert message.hidden is not None
        spans = [passenger.span for passenger in message.passengers]
        kv = self._cache(message.max_tokens)
        if message.kind == Kind.prefill:
            beginning = [span.slot for span in spans if span.start == 0]
            self._queues |= {slot: SegmentQueue(self.runner.model, kv, slot) for slot in beginning}
        queues = [self._queues[span.slot] for span in spans]
        for queue, rows in zip(queues, message.hidden.split([span.count for span in spans]), strict=True):
            queue.before[0].put(rows)
        self._stage.take(message, queues)

    def _cache(self, max_tokens: int) -> KVCache:
        """The first stage replaces its cache by a larger one only while no sequence runs; so does this one."""
        if self.kv is None or self.kv.shape.max_tokens != max_tokens:
            self.kv = None
            self._queues.clear()
            self.runner.forget()
            check_fits(self.runner.model, max_tokens, self.options.max_batch)
            self.kv = self.runner.model.cache(max_tokens, self.options.max_batch)
        return self.kv
