"""Ways of decoding that are compared: a mode with its options, and a policy with its thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from eellm.config.schema import DecodingConfig, DecodingMode, ExitPolicyConfig
from eellm.decoding.decoder import DecoderOptions
from eellm.decoding.policy import Policy, build_policy, never_exit
from eellm.model.spec import ModelSpec


@dataclass(frozen=True)
class Setting:
    """One row of a table."""

    options: DecoderOptions
    policy: Policy


def swept(
    modes: Sequence[DecodingMode],
    decoding: DecodingConfig,
    exit_policy: ExitPolicyConfig,
    thresholds: Sequence[float],
    spec: ModelSpec,
) -> list[Setting]:
    """Full depth first, then every other mode at each threshold of `exit_policy`, or once where it has no threshold.

    `patience` counts exits: in place of the thresholds it gets 1, 2, .. up to all of them.
    """
    if exit_policy.kind == "patience":
        thresholds = range(1, len(spec.exits if exit_policy.active is None else exit_policy.active) + 1)
    policies = [build_policy(exit_policy.model_copy(update={"threshold": value}), spec) for value in thresholds]
    policies = [policy for number, policy in enumerate(policies) if policy.active and policy not in policies[:number]]
    options = [replace(DecoderOptions.of(decoding), mode=mode, max_batch=1, max_tokens=None) for mode in modes if mode != "full"]
    others = [Setting(mode, policy) for mode in options for policy in policies]
    return [Setting(DecoderOptions("full", compile=decoding.compile), never_exit(spec)), *others]


def threshold_cell(policy: Policy) -> float | str | None:
    """For tables: one threshold, several as a text, None where the rule has none."""
    threshold = policy.threshold
    return " ".join(map(str, threshold)) if isinstance(threshold, list) else threshold
