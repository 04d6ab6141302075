"""Choosing a token from a head's logits: greedy, temperature, top-k, top-p, under any tensor parallelism.

Greedy needs no more than the reading. Plain temperature sampling inverts the cumulative distribution in the order of
ids: ranks exchange their total mass, and the one in whose range the draw falls finds the token. Top-k and top-p gather
the k largest logits of every rank, for top-p as many as the nucleus turns out to need. The draw is a function of the
request's seed and the token's position, and of nothing else: neighbours, history and the number of ranks do not
change it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from eellm.decoding.reading import Reading
from eellm.model.vocabulary import Vocabulary

_FIRST_CANDIDATES = 64


@dataclass(frozen=True)
class SamplingOptions:
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off. Top-p acts on what top-k leaves, renormalised."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = SamplingOptions()


def uniform(seed: int, position: int, purpose: str = "token") -> float:
    """The random number in [0, 1) of a request's token: a counter-based generator out of a hash, 53 bits.

    Numbers for different purposes are independent.
    """
    counter = f"{seed}/{position}" if purpose == "token" else f"{seed}/{position}/{purpose}"
    digest = hashlib.blake2b(counter.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def choose(reading: Reading, options: SamplingOptions, draw: float) -> tuple[int, float]:
    """(token id, its log-probability) for a reading of one token; `draw` in [0, 1).

    The log-probability is that of the emitting head's own distribution, softmax of its logits: neither the sampling
    options nor the temperature of an exit's confidence change it.
    """
    if options.temperature == 0.0:
        return int(reading.statistics.prediction), float(reading.best - reading.log_normaliser)
    if options.top_k == 0 and options.top_p == 1.0:
        token = invert(_masses(reading, options.temperature), reading.vocabulary, draw)
    else:
        ids, masses = _kept(reading, options)
        cumulative = masses.cumsum(0)
        place = torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp(max=len(ids) - 1)
        token = int(ids[place])
    return token, log_probability(reading, token)


def log_probability(reading: Reading, token: int) -> float:
    """Of a token under the head's own distribution, for a reading of one token."""
    return float(value_at(reading.logits[0], reading.vocabulary, token) - reading.log_normaliser)


def most_probable(reading: Reading, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most probable (token id, log-probability) under the head's own distribution, for a reading of one token."""
    if count == 0:
        return ()
    values, ids = _largest(reading.logits[0], reading.vocabulary, min(count, reading.vocabulary.size))
    return tuple(zip(ids.tolist(), (values - reading.log_normaliser).tolist(), strict=True))


def value_at(values: torch.Tensor, vocabulary: Vocabulary, token: int) -> torch.Tensor:
    """The entry of a token in [rows], on all tensor-parallel ranks."""
    index, here = vocabulary.local(torch.tensor(token, device=values.device))
    return vocabulary.reduce(values[index] * here if vocabulary.rows else values.new_zeros(()))


def distribution(reading: Reading, options: SamplingOptions) -> torch.Tensor:
    """What `choose` draws from: this rank's part [rows] of the probabilities, fp64, for a reading of one token."""
    vocabulary = reading.vocabulary
    if options.temperature == 0.0:
        ids, masses = reading.statistics.prediction, reading.logits.new_ones(1, dtype=torch.float64)
    elif options.top_k == 0 and options.top_p == 1.0:
        masses = _masses(reading, options.temperature)
        return masses / vocabulary.reduce(masses.sum())
    else:
        ids, masses = _kept(reading, options)
    index, here = vocabulary.local(ids)
    own = masses.new_zeros(vocabulary.rows)
    return own.index_put_((index[here],), (masses / masses.sum())[here])


def invert(masses: torch.Tensor, vocabulary: Vocabulary, draw: float) -> int:
    """The id at which the cumulative sum of masses [rows], in the order of ids over all ranks, passes `draw` of the whole."""
    cumulative = masses.cumsum(0)
    totals = cumulative[-1:] if vocabulary.rows else cumulative.new_zeros(1)
    if vocabulary.group.size() > 1:
        own = totals
        totals = own.new_empty(vocabulary.group.size())
        dist.all_gather_into_tensor(totals, own, group=vocabulary.group)
    holders = [(rank, mass) for rank, mass in enumerate(totals.tolist()) if mass > 0]
    target = draw * sum(mass for _, mass in holders)
    # a draw that rounds up to the whole mass falls to the last rank, and there to the last id, that has any
    for rank, mass in holders:
        if target < mass or rank == holders[-1][0]:
            break
        target -= mass
    token = torch.zeros((), dtype=torch.long, device=masses.device)
    if rank == vocabulary.group.rank():
        last = torch.searchsorted(cumulative, cumulative[-1])
        token = vocabulary.start + torch.searchsorted(cumulative, target, right=True).clamp(max=last)
    return int(vocabulary.reduce(token))


def _kept(reading: Reading, options: SamplingOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that top-k and top-p leave and their masses, largest first; the same on all ranks."""
    count = options.top_k or _FIRST_CANDIDATES
    vocabulary = reading.vocabulary
    whole = None if options.top_k else vocabulary.reduce(_masses(reading, options.temperature).sum())
    while True:
        values, ids = _largest(reading.logits[0], vocabulary, min(count, vocabulary.size))
        masses = ((values.double() - reading.best) / options.temperature).exp()
        cumulative = masses.cumsum(0)
        needed = options.top_p * (cumulative[-1] if whole is None else whole)
        if whole is None or cumulative[-1] >= needed or len(values) == vocabulary.size:
            break
        count *= 4
    # the smallest set that reaches top_p: those before which it was not reached
    kept = int((cumulative - masses < needed).sum())
    return ids[:kept], masses[:kept]


def _masses(reading: Reading, temperature: float) -> torch.Tensor:
    """exp((logit - largest) / temperature) [rows], fp64."""
    return ((reading.logits[0].double() - reading.best) / temperature).exp()


def _largest(logits: torch.Tensor, vocabulary: Vocabulary, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits over all ranks in descending order, and their ids; ties by id."""
    values, ids = logits.topk(min(count, logits.shape[0]))
    ids = ids + vocabulary.start
    if vocabulary.group.size() > 1:
        missing = (0, count - values.shape[0])
        values = torch.nn.functional.pad(values, missing, value=-torch.inf)
        ids = torch.nn.functional.pad(ids, missing, value=vocabulary.size)
        gathered = [tensor.new_empty(vocabulary.group.size() * count) for tensor in (values, ids)]
        for whole, own in zip(gathered, (values, ids), strict=True):
            dist.all_gather_into_tensor(whole, own, group=vocabulary.group)
        values, ids = gathered
    by_id = ids.argsort()
    order = by_id[values[by_id].argsort(descending=True, stable=True)][:count]
    return values[order], ids[order]
