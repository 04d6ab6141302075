"""How many tokens to draft before the full model verifies them: as many as pay.

With the probability g that an exit is confident enough to draft, and a that the full model accepts a draft, a round of at
most k drafts yields sum_{j=0..k} (g a)^j tokens (arXiv 2211.17192, section 3.1, with drafts that may end early). Its cost:
every attempt reads the exits' heads, every draft takes one token through the early layers, and the pass that verifies n
drafts takes n + 1 tokens through the later ones. The k with the most tokens for its cost is chosen; 0 is full decoding.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from eellm.decoding.model.segments import InferenceModel
from eellm.device_clock import seconds_on

MAX_DRAFTS = 8
_TRIALS = 2
_PROBING_SHARE = 0.02
_MEMORY = 0.9


@dataclass(frozen=True)
class DraftCosts:
    """Bytes of weights: an attempt's `heads`, a draft's `early` layers, and what a token at full depth reads besides `early`.

    `curve[n]` is the cost of n + 1 rows of a matrix product in costs of one row; all 1 where weights are all that counts.
    """

    heads: float
    early: float
    late: float
    curve: tuple[float, ...] = (1.0,) * (MAX_DRAFTS + 1)

    @classmethod
    def of(cls, model: InferenceModel, curve: tuple[float, ...]) -> DraftCosts:
        """Of drafts that come from the deepest active exit, after the others were asked in vain.

        Tensor-parallel ranks must draft alike, but padding leaves the last ones fewer rows: the largest rank's count.
        """
        assert model.final is not None, "one stage drafts and verifies"
        exits = [(index, segment.exit.name) for index, segment in enumerate(model.segments) if segment.exit is not None]
        early = sum(model.segment_bytes[: exits[-1][0] + 1])
        late = sum(model.segment_bytes) - early + model.head_bytes["final"]
        own = [sum(model.head_bytes[name] for _, name in exits), early, late]
        most = model.vocabulary.reduce(torch.tensor(own, dtype=torch.float64, device=model.device), dist.ReduceOp.MAX)
        return cls(float(most[0]), float(most[1]), float(most[2]), curve)

    def verification(self, drafts: int) -> float:
        """The pass that ends a round; without drafts, a token at full depth."""
        return self.early + self.late * self.curve[drafts]


def tokens_per_cost(limit: int, drafts: float, accepts: float, costs: DraftCosts) -> float:
    """Expected tokens of a round of at most `limit` drafts over its expected cost; see above."""
    tokens = sum((drafts * accepts) ** count for count in range(limit + 1))
    cost = sum(drafts**count * (costs.heads + drafts * costs.early) for count in range(limit))
    for count in range(limit + 1):
        ends_here = 1.0 if count == limit else 1 - drafts
        cost += drafts**count * ends_here * costs.verification(count)
    return tokens / cost


@dataclass
class _Share:
    """A running estimate of a probability; recent cases count more. It begins as if two cases had gone 60 to 40."""

    hits: float = 1.2
    cases: float = 2.0

    def learn(self, hits: int, cases: int) -> None:
        fading = _MEMORY**cases
        self.hits, self.cases = self.hits * fading + hits, self.cases * fading + cases

    @property
    def value(self) -> float:
        return self.hits / max(self.cases, 1e-6)


@dataclass
class AdaptiveLength:
    """Chooses the next round's length from what the rounds before have shown.

    Begins with a few single drafts. Where drafting does not pay, single drafts are tried so rarely that they cost two
    percent of full decoding. A long draft is tried only after a shorter one was accepted whole.
    """

    costs: DraftCosts
    accepts: _Share = field(default_factory=_Share)
    drafts: _Share = field(default_factory=_Share)
    ceiling: int = 1
    trials: int = 0
    since_probe: int = 0

    def choose(self) -> int:
        self.since_probe += 1
        if self.trials < _TRIALS:
            self.trials += 1
            return 1
        best = max(range(self.ceiling + 1), key=self._pays)
        if best == 0 and self.since_probe < self._probe_interval():
            return 0
        self.since_probe = 0
        return max(best, 1)

    def learn(self, limit: int, drafted: int, examined: int, accepted: int) -> None:
        """After a round that might make `limit` drafts, made `drafted`, and had `accepted` of the `examined` ones accepted."""
        self.drafts.learn(drafted, min(drafted + 1, limit))
        self.accepts.learn(accepted, examined)
        if accepted == limit:
            self.ceiling = min(2 * self.ceiling, MAX_DRAFTS)
        elif accepted < examined:
            self.ceiling = max(1, min(self.ceiling, accepted + 1))

    def _pays(self, limit: int) -> float:
        return tokens_per_cost(limit, self.drafts.value, self.accepts.value, self.costs)

    def _probe_interval(self) -> int:
        """Rounds of one token each between probes."""
        full = self.costs.verification(0)
        probe = self.costs.heads + self.costs.early + self.costs.verification(1) - full
        return math.ceil(probe / (_PROBING_SHARE * full))


@torch.inference_mode()
def measured_curve(model: InferenceModel, clock: Callable[[], float] = time.perf_counter, repeats: int = 3) -> tuple[float, ...]:
    """Time of 1, 2, .., MAX_DRAFTS + 1 rows through all MLPs over that of one row; equal on all tensor-parallel ranks.

    All layers take part, so that weights come from memory as they do in decoding; about a second for a model of 100M parameters.
    On CUDA decoding repeats one-row passes as graphs and runs several rows eagerly, which this does not see.
    """
    layers = [layer for segment in model.segments for layer in segment.layers]
    times: list[list[float]] = [[] for _ in range(MAX_DRAFTS + 1)]
    for repeat in range(repeats + 1):
        for rows, own in enumerate(times, 1):
            hidden = torch.ones(rows, 1, model.spec.hidden_size, dtype=model.dtype, device=model.device)
            started = seconds_on(model.device, clock)
            for layer in layers:
                layer.mlp(hidden)
            if repeat:  # the first one warms up
                own.append(seconds_on(model.device, clock) - started)
    medians = torch.tensor([statistics.median(own) for own in times], dtype=torch.float64, device=model.device)
    curve = model.vocabulary.reduce(medians / medians[0], dist.ReduceOp.MAX)
    return tuple(curve.tolist())
