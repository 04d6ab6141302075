"""Which head speaks at every place of a given text: what a decoder that follows the text would have emitted by.

A decoder that takes a text one token at a time (`Continuation.replace`) asks the policy at every exit, on
hidden states that do not depend on who spoke before: the key-value cache is always that of full depth. So one pass over
the whole text, with all heads, holds all that every policy would have seen. `max_pending` and `min_new_tokens` do look
back, at no more than how many tokens have left; `speakers` counts them. (kv_recompute differs by rounding only.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eellm.decoding.decoder import DecoderOptions, effective_policy
from eellm.decoding.policy import Policy, never_exit
from eellm.model.spec import ModelSpec
from eellm.model.statistics import HeadStatistics


def scoring_policy(policy: Policy, options: DecoderOptions, spec: ModelSpec) -> Policy:
    """The policy by which a mode's distributions come from exits: none where the final head has the last word."""
    return never_exit(spec) if options.mode == "self_speculative" else effective_policy(policy, options, spec)


def speakers(heads: Sequence[HeadStatistics], policy: Policy, max_pending: int | None, layers: Sequence[int]) -> torch.Tensor:
    """Index [n] into `heads` of who speaks at each of the n places of a sequence.

    `heads`: statistics [n] of the exits behind `layers[:-1]`, ascending, and of the final head behind `layers[-1]` layers.
    The policy's active exits are all of these, or none.
    """
    final = len(heads) - 1
    chosen = torch.full_like(heads[-1].prediction, final)
    if not policy.active:
        return chosen
    assert policy.active == tuple(layers[:-1]), "the exits that were scored are those that the policy asks"
    for index in reversed(range(final)):
        chosen[policy.decide(heads[: index + 1])] = index
    if not policy.min_new_tokens and max_pending is None:
        return chosen
    pending = 0
    for place in range(len(chosen)):
        if place < policy.min_new_tokens or (max_pending is not None and pending >= max_pending):
            chosen[place] = final
        pending = 0 if layers[int(chosen[place])] == layers[-1] else pending + 1
    return chosen
