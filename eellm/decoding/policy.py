"""Exit policies: when a head in the middle of the model may speak for the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eellm.config.schema import ExitPolicyConfig
from eellm.errors import ConfigError, Problem
from eellm.model.spec import ModelSpec
from eellm.model.statistics import HeadStatistics

Seen = Sequence[HeadStatistics]
"""Statistics [n] of the exits that n tokens have been evaluated at, in order of depth; the last is where they stand."""


def _max_probability(seen: Seen, threshold: float, vocab_size: int) -> torch.Tensor:
    return seen[-1].probability >= threshold


def _margin(seen: Seen, threshold: float, vocab_size: int) -> torch.Tensor:
    return seen[-1].probability - seen[-1].second_probability >= threshold


def _entropy(seen: Seen, threshold: float, vocab_size: int) -> torch.Tensor:
    return seen[-1].entropy <= threshold * math.log(vocab_size)


def _patience(seen: Seen, threshold: float, vocab_size: int) -> torch.Tensor:
    """PABEE (arXiv 2006.04152), with the exits' predictions in place of its classifiers'."""
    count = math.ceil(threshold)
    here = seen[-1].prediction
    if len(seen) < count:
        return torch.zeros_like(here, dtype=torch.bool)
    return torch.stack([at.prediction == here for at in seen[-count:]]).all(0)


def _fixed_layer(seen: Seen, threshold: float, vocab_size: int) -> torch.Tensor:
    return torch.ones_like(seen[-1].prediction, dtype=torch.bool)


def _never(seen: Seen, threshold: float, vocab_size: int) -> torch.Tensor:
    return torch.zeros_like(seen[-1].prediction, dtype=torch.bool)


_RULES: dict[str, Callable[[Seen, float, int], torch.Tensor]] = {
    "max_probability": _max_probability,
    "margin": _margin,
    "entropy": _entropy,
    "patience": _patience,
    "fixed_layer": _fixed_layer,
    "never": _never,
}


@dataclass(frozen=True)
class Policy:
    """A rule with its thresholds. Only exits after the layers in `active` are evaluated at all.

    `thresholds` has one value per active exit: the least probability, the least margin between the two most probable
    tokens, the largest entropy as a share of log(vocabulary), or the number of exits in a row, this one included, that
    must predict the same. A probability threshold of 1 lets a token go that rounds to it; `never` does not.
    """

    kind: str
    active: tuple[int, ...]
    thresholds: tuple[float, ...]
    vocab_size: int
    min_new_tokens: int = 0

    def decide(self, seen: Seen) -> torch.Tensor:
        """Which of n tokens exit here [n], given what the active exits up to here said about them."""
        return _RULES[self.kind](seen, self.thresholds[len(seen) - 1], self.vocab_size)

    @property
    def threshold(self) -> float | list[float] | None:
        """For tables: one number where all exits share it, None where the rule has none."""
        if self.kind in ("fixed_layer", "never"):
            return None
        return self.thresholds[0] if len(set(self.thresholds)) == 1 else list(self.thresholds)


def never_exit(spec: ModelSpec) -> Policy:
    """The policy that evaluates no exit."""
    return Policy("never", (), (), spec.vocab_size)


def build_policy(config: ExitPolicyConfig, spec: ModelSpec) -> Policy:
    """The policy for a model. Raises ConfigError with everything that does not fit the model's exits."""
    if config.kind == "never":
        return never_exit(spec)
    if config.kind == "fixed_layer":
        active = [] if config.layer is None else [config.layer]
    else:
        active = spec.exit_layers if config.active is None else sorted(config.active)
    problems = _problems(config, spec, active)
    if problems:
        raise ConfigError(problems)
    given = config.threshold if isinstance(config.threshold, list) else [config.threshold] * len(active)
    thresholds = (0.0,) if config.kind == "fixed_layer" else tuple(given)
    return Policy(config.kind, tuple(active), thresholds, spec.vocab_size, config.min_new_tokens)


def _problems(config: ExitPolicyConfig, spec: ModelSpec, active: list[int]) -> list[Problem]:
    problems = []
    layers = f"the model has exits after layers {spec.exit_layers}"
    choose = f"choose from {spec.exit_layers}" if spec.exits else "exit_policy=never"
    if config.kind == "fixed_layer" and config.layer not in spec.exit_layers:
        problems.append(Problem("exit_policy.layer", config.layer, f"no exit there: {layers}", choose))
    elif config.active is not None and (set(config.active) - set(spec.exit_layers) or len(set(active)) != len(active)):
        problems.append(Problem("exit_policy.active", config.active, f"not a set of exits: {layers}", choose))
    thresholds = config.threshold
    if config.kind != "fixed_layer" and isinstance(thresholds, list) and len(thresholds) != len(active):
        reason = f"{len(thresholds)} thresholds for {len(active)} active exits {active}"
        problems.append(Problem("exit_policy.threshold", thresholds, reason, "one number, or one per active exit"))
    if config.kind == "patience" and min(thresholds if isinstance(thresholds, list) else [thresholds], default=1) < 1:
        problems.append(Problem("exit_policy.threshold", thresholds, "at least one exit must agree", "1 or more"))
    return problems
