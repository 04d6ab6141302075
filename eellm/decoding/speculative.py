"""Self-speculative decoding: exits draft, the pass that catches up verifies with the final head. What comes out is the
full model's: the same tokens when greedy, the same distribution when sampling.

A round of a sequence: its last token and then each draft enter the model and leave at the first exit that the policy
trusts, which drafts the next token, until the draft is long enough or no exit is trusted. Then all that is pending goes
through the later layers in one forward, and the final head says for every row what should have followed. Drafts are kept up
to the first that it rejects; that one and all behind it leave the queue and the KV cache, and the final head's own token
takes their place. Drafts share the early layers' keys, values and hidden states with the verification (LayerSkip, arXiv
2404.16710, section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from weakref import WeakKeyDictionary

from eellm.decoding.continuation import Continuation, Token
from eellm.decoding.draft_length import AdaptiveLength, DraftCosts, measured_curve
from eellm.decoding.modes import Emitted, WholeModel, leave_early
from eellm.decoding.policy import Policy
from eellm.decoding.queue import SegmentQueue, SegmentRunner
from eellm.decoding.reading import Reading
from eellm.decoding.sampling import choose, distribution, invert, log_probability, most_probable, uniform, value_at
from eellm.model.spec import ModelSpec


def drafting(policy: Policy, spec: ModelSpec) -> Policy:
    """The policy without an exit behind the last layer, which would draft at the cost of the full model."""
    count = sum(layer < spec.num_layers for layer in policy.active)
    return replace(policy, active=policy.active[:count], thresholds=policy.thresholds[:count])


@dataclass
class _Round:
    """Drafts for one sequence, each with what its exit said."""

    sequence: Continuation
    limit: int
    ids: list[int] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)

    @property
    def queue(self) -> SegmentQueue:
        return self.sequence.queue

    @property
    def text(self) -> list[int]:
        return self.sequence.ids + self.ids

    def draft(self, reading: Reading) -> None:
        request = self.sequence.request
        self.ids.append(choose(reading, request.sampling, uniform(request.seed, len(self.text), "draft"))[0])
        self.readings.append(reading)


class SelfSpeculative(WholeModel):
    """Rounds of all sequences side by side: they draft in turns and are verified in one pass.

    `draft_length` fixed, or `auto`: from each sequence's own record, as its draws depend on it; what is greedy gives the
    same tokens at any length, so greedy sequences share one record.
    """

    def __init__(self, runner: SegmentRunner, draft_length: int | Literal["auto"]):
        super().__init__(runner)
        exits = [index for index, segment in enumerate(runner.model.segments) if segment.exit is not None]
        self._drafting_segments = exits[-1] + 1 if exits else 0
        self._fixed = draft_length if exits and draft_length != "auto" else 0
        adapts = bool(exits) and draft_length == "auto"
        self._costs = DraftCosts.of(runner.model, measured_curve(runner.model)) if adapts else None
        self._greedy_record = self._new_record()
        self._records: WeakKeyDictionary[Continuation, AdaptiveLength | None] = WeakKeyDictionary()

    def advance(self, sequences: Sequence[Continuation]) -> Emitted:
        rounds = [_Round(sequence, self._limit(sequence)) for sequence in sequences]
        going = [round_ for round_ in rounds if round_.limit]
        while going:
            going = self._draft(going)
        return self._verify(rounds)

    def _new_record(self) -> AdaptiveLength | None:
        return None if self._costs is None else AdaptiveLength(self._costs)

    def _record(self, sequence: Continuation) -> AdaptiveLength | None:
        if sequence.request.sampling.temperature == 0.0:
            return self._greedy_record
        if sequence not in self._records:
            self._records[sequence] = self._new_record()
        return self._records[sequence]

    def _limit(self, sequence: Continuation) -> int:
        """Drafts that the next round may make; the final head adds one token to those it accepts."""
        policy = sequence.policy
        if not policy.active or len(sequence.tokens) < policy.min_new_tokens or sequence.remaining == 1:
            return 0
        record = self._record(sequence)
        return min(self._fixed if record is None else record.choose(), sequence.remaining - 1)

    def _draft(self, rounds: list[_Round]) -> list[_Round]:
        """One more token each; returns the rounds that go on drafting."""
        queues = [round_.queue for round_ in rounds]
        self.runner.push(queues, [round_.text for round_ in rounds])
        policies = [round_.sequence.policy for round_ in rounds]
        said = leave_early(self.runner, policies, queues, self._drafting_segments)
        going = []
        for round_, reading in zip(rounds, said, strict=True):
            if reading is not None:
                round_.draft(reading)
                if len(round_.ids) < round_.limit:
                    going.append(round_)
        return going

    def _verify(self, rounds: list[_Round]) -> Emitted:
        runner, queues = self.runner, [round_.queue for round_ in rounds]
        runner.push(queues, [round_.text for round_ in rounds])
        runner.finish(queues)
        final = runner.read_final(queues, newest_only=False)
        emitted: Emitted = []
        first = 0
        for round_ in rounds:
            rows = [final.at(first + place) for place in range(len(round_.ids) + 1)]
            first += len(rows)
            emitted += [(round_.sequence, token) for token in self._settle(round_, rows)]
        return emitted

    def _settle(self, round_: _Round, rows: list[Reading]) -> list[Token]:
        """Emit what the final head makes of a round; `rows` are its readings of the last token and of each draft."""
        sequence, before = round_.sequence, len(round_.sequence.tokens)
        examined = accepted = 0
        while examined < len(round_.ids) and examined == accepted and sequence.end is None:
            drafted, draft, final = round_.ids[examined], round_.readings[examined], rows[examined]
            id_, kept = _verdict(sequence, drafted, draft, final)
            confidence, logprob = float(final.statistics.probability), log_probability(final, id_)
            others = most_probable(final, sequence.request.alternatives)
            sequence.emit(Token(id_, final.head, final.layer, confidence, logprob, draft.head if kept else None, others))
            examined, accepted = examined + 1, accepted + int(kept)
        if accepted == len(round_.ids) and sequence.end is None:
            sequence.emit_from(rows[-1])
        if round_.ids:
            round_.queue.truncate(len(sequence.ids) - 1)
            self.runner.counters.add_verification(len(round_.ids), accepted)
        record = self._record(sequence)
        if record is not None and round_.limit:
            record.learn(round_.limit, [reading.layer for reading in round_.readings], examined, accepted)
        return sequence.tokens[before:]


def _verdict(sequence: Continuation, drafted: int, draft: Reading, final: Reading) -> tuple[int, bool]:
    """(the next token, whether it is the draft), so that it follows the final head's distribution.

    Speculative sampling (arXiv 2211.17192, algorithm 1): a draft of probability q under its exit and p under the final head
    is kept with probability min(1, p / q); else the token comes from max(p - q, 0), normalised.
    """
    request, position = sequence.request, len(sequence.ids)
    if request.sampling.temperature == 0.0:
        wanted = int(final.statistics.prediction)
        return wanted, wanted == drafted
    wanted_shares, shares = (distribution(reading, request.sampling) for reading in (final, draft))
    p, q = (float(value_at(values, final.vocabulary, drafted)) for values in (wanted_shares, shares))
    if uniform(request.seed, position, "accept") * q < p:
        return drafted, True
    missing = (wanted_shares - shares).clamp(min=0)
    return invert(missing, final.vocabulary, uniform(request.seed, position, "reject")), False
