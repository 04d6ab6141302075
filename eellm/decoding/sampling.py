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


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a request's token: a counter-based generator out of a hash, 53 bits."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def choose(reading: Reading, options: SamplingOptions, draw: float) -> tuple[int, float]:
    """(token id, its log-probability) for a reading of one token; `draw` in [0, 1).

    The log-probability is that of the emitting head's own distribution, softmax of its logits: neither the sampling
    options nor the temperature of an exit's confidence change it.
    """
    if options.temperature == 0.0:
        return int(reading.statistics.prediction), float(reading.best - reading.log_normaliser)
    logits, vocabulary = reading.logits[0], reading.vocabulary
    if options.top_k == 0 and options.top_p == 1.0:
        token = _invert(logits, vocabulary, float(reading.best), options.temperature, draw)
    else:
        token = _draw_candidate(reading, options, draw)
    index, here = vocabulary.local(torch.tensor(token, device=logits.device))
    logit = logits[index] * here if vocabulary.rows else logits.new_zeros(())
    return token, float(vocabulary.reduce(logit) - reading.log_normaliser)


def _invert(logits: torch.Tensor, vocabulary: Vocabulary, best: float, temperature: float, draw: float) -> int:
    """The id at which the cumulative distribution of softmax(logits / temperature) passes `draw`."""
    cumulative = ((logits.double() - best) / temperature).exp().cumsum(0)
    masses = cumulative[-1:] if vocabulary.rows else cumulative.new_zeros(1)
    if vocabulary.group.size() > 1:
        own = masses
        masses = own.new_empty(vocabulary.group.size())
        dist.all_gather_into_tensor(masses, own, group=vocabulary.group)
    holders = [(rank, mass) for rank, mass in enumerate(masses.tolist()) if mass > 0]
    target = draw * sum(mass for _, mass in holders)
    # a draw that rounds up to the whole mass falls to the last rank that has any
    for rank, mass in holders:
        if target < mass or rank == holders[-1][0]:
            break
        target -= mass
    token = torch.zeros((), dtype=torch.long, device=logits.device)
    if rank == vocabulary.group.rank():
        token = vocabulary.start + torch.searchsorted(cumulative, target, right=True).clamp(max=vocabulary.rows - 1)
    return int(vocabulary.reduce(token))


def _draw_candidate(reading: Reading, options: SamplingOptions, draw: float) -> int:
    logits, vocabulary = reading.logits[0], reading.vocabulary
    count = options.top_k or _FIRST_CANDIDATES
    whole = None if options.top_k else _mass(reading, options.temperature)
    while True:
        values, ids = _largest(logits, vocabulary, min(count, vocabulary.size))
        masses = ((values.double() - reading.best) / options.temperature).exp()
        cumulative = masses.cumsum(0)
        needed = options.top_p * (cumulative[-1] if whole is None else whole)
        if whole is None or cumulative[-1] >= needed or len(values) == vocabulary.size:
            break
        count *= 4
    # the smallest set that reaches top_p: those before which it was not reached
    kept = int((cumulative - masses < needed).sum())
    place = torch.searchsorted(cumulative[:kept], draw * cumulative[kept - 1], right=True).clamp(max=kept - 1)
    return int(ids[place])


def _mass(reading: Reading, temperature: float) -> torch.Tensor:
    """Sum of exp((logit - largest) / temperature) over the whole vocabulary, fp64."""
    return reading.vocabulary.reduce(((reading.logits[0].double() - reading.best) / temperature).exp().sum())


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
