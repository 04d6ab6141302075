"""How many tokens to draft before the full model verifies them: as many as pay.

With the probability g that an exit is confident enough to draft, and a that the full model accepts a draft, a round of at
most k drafts yields sum_{j=0..k} (g a)^j tokens (arXiv 2211.17192, section 3.1, with drafts that may end early). Its cost:
every draft takes one token through the layers below the exit that made it and reads the heads up to there, an attempt in which
no exit is confident has read all heads, and the pass that verifies n drafts takes n + 1 tokens through the layers above. Which
exit drafts is learnt like g and a: where the first ones do, drafts are cheap. The k with the most tokens for its cost is
chosen; 0 is full decoding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from eellm.decoding.model.segments import InferenceModel
from eellm.device_clock import seconds_on

MAX_DRAFTS = 8
_TRIALS = 2
_PROBING_SHARE = 0.02
_MEMORY = 0.9


class Draft(NamedTuple):
    """Bytes of weights that a draft reads: the heads asked on the way, and the layers up to its exit."""

    heads: float
    early: float


@dataclass(frozen=True)
class DraftCosts:
    """What drafts read, by the layer of their exit, from the first to the deepest; and a token at full depth, in bytes.

    `curve[n]` is the cost of n + 1 rows of a matrix product in costs of one row; all 1 where weights are all that counts.
    """

    exits: dict[int, Draft]
    full: float
    curve: tuple[float, ...] = (1.0,) * (MAX_DRAFTS + 1)

    @classmethod
    def of(cls, model: InferenceModel, curve: tuple[float, ...]) -> DraftCosts:
        """Tensor-parallel ranks must draft alike, but padding leaves the last ones fewer rows: the largest rank's count."""
        assert model.final is not None, "one stage drafts and verifies"
        layers, own, heads = [], [], 0
        for index, segment in enumerate(model.segments):
            if segment.exit is not None:
                heads += model.head_bytes[segment.exit.name]
                layers.append(segment.exit.head.layer)
                own.append([heads, sum(model.segment_bytes[: index + 1])])
        own.append([0, sum(model.segment_bytes) + model.head_bytes["final"]])
        most = torch.tensor(own, dtype=torch.float64, device=model.device)
        *drafts, (_, full) = model.vocabulary.reduce(most, dist.ReduceOp.MAX).tolist()
        return cls({layer: Draft(*draft) for layer, draft in zip(layers, drafts, strict=True)}, full, curve)

    @property
    def deepest(self) -> Draft:
        return self.exits[max(self.exits)]

    def verification(self, drafts: int, early: float) -> float:
        """The pass that ends a round whose drafts wait behind `early` bytes of layers; without any, a token at full depth."""
        return early + (self.full - early) * self.curve[drafts]


def tokens_per_cost(limit: int, drafts: float, accepts: float, costs: DraftCosts, draft: Draft) -> float:
    """Expected tokens of a round of at most `limit` drafts, each like `draft`, over its expected cost; see above."""
    tokens = sum((drafts * accepts) ** count for count in range(limit + 1))
    attempt = drafts * (draft.heads + draft.early) + (1 - drafts) * costs.deepest.heads
    cost = sum(drafts**count * attempt for count in range(limit))
    for count in range(limit + 1):
        ends_here = 1.0 if count == limit else 1 - drafts
        cost += drafts**count * ends_here * costs.verification(count, draft.early)
    return tokens / cost


@dataclass
class _Mean:
    """A running mean; recent cases count more. `total` and `cases` begin with what it is taken for before anything is known."""

    total: float
    cases: float = 2.0

    def learn(self, total: float, cases: int) -> None:
        fading = _MEMORY**cases
        self.total, self.cases = self.total * fading + total, self.cases * fading + cases

    @property
    def value(self) -> float:
        return self.total / max(self.cases, 1e-6)


def _likely() -> _Mean:
    """Of a probability, as if two cases had gone 60 to 40."""
    return _Mean(1.2)


@dataclass
class AdaptiveLength:
    """Chooses the next round's length from what the rounds before have shown.

    Begins with a few single drafts. Where drafting does not pay, single drafts are tried so rarely that they cost two
    percent of full decoding. A long draft is tried only after a shorter one was accepted whole.
    """

    costs: DraftCosts
    accepts: _Mean = field(default_factory=_likely)
    drafts: _Mean = field(default_factory=_likely)
    ceiling: int = 1
    trials: int = 0
    since_probe: int = 0

    def __post_init__(self) -> None:
        # as if two drafts had come from the deepest exit, after the others were asked in vain
        self._draft = [_Mean(2 * read) for read in self.costs.deepest]
        self._settled: tuple[int, int] | None = None  # the best length and the probes' interval, until a round teaches more

    @property
    def draft(self) -> Draft:
        """What a draft reads, in the mean."""
        return Draft(*(mean.value for mean in self._draft))

    def choose(self) -> int:
        self.since_probe += 1
        if self.trials < _TRIALS:
            self.trials += 1
            return 1
        if self._settled is None:
            self._settled = max(range(self.ceiling + 1), key=self._pays), self._probe_interval()
        best, interval = self._settled
        if best == 0 and self.since_probe < interval:
            return 0
        self.since_probe = 0
        return max(best, 1)

    def learn(self, limit: int, layers: Sequence[int], examined: int, accepted: int) -> None:
        """After a round that might make `limit` drafts, made them at the exits behind `layers`, and had `accepted` of the
        `examined` ones accepted."""
        self._settled = None
        for layer in layers:
            for mean, read in zip(self._draft, self.costs.exits[layer], strict=True):
                mean.learn(read, 1)
        self.drafts.learn(len(layers), min(len(layers) + 1, limit))
        self.accepts.learn(accepted, examined)
        if accepted == limit:
            self.ceiling = min(2 * self.ceiling, MAX_DRAFTS)
        elif accepted < examined:
            self.ceiling = max(1, min(self.ceiling, accepted + 1))

    def _pays(self, limit: int) -> float:
        return tokens_per_cost(limit, self.drafts.value, self.accepts.value, self.costs, self.draft)

    def _probe_interval(self) -> int:
        """Rounds of one token each between probes."""
        heads, early = self.draft
        vain = heads + early + self.costs.verification(1, early) - self.costs.full
        probe = max(vain, self.costs.deepest.heads)
        return math.ceil(probe / (_PROBING_SHARE * self.costs.full))


@torch.inference_mode()
def measured_curve(model: InferenceModel, clock: Callable[[], float] = time.perf_counter, repeats: int = 3) -> tuple[float, ...]:
    """Time of 1, 2, .., MAX_DRAFTS + 1 rows through all MLPs over that of one row; equal on all tensor-parallel ranks.

    All layers take part, so that weights come from memory as they do in decoding; two seconds and a half for a model of 100M
    parameters on one core. On CUDA decoding repeats one-row passes as graphs and runs several rows eagerly, which this does not
    see.
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
    # what else the machine does can only make a pass longer
    shortest = torch.tensor([min(own) for own in times], dtype=torch.float64, device=model.device)
    curve = model.vocabulary.reduce(shortest / shortest[0], dist.ReduceOp.MAX)
    return tuple(curve.tolist())
