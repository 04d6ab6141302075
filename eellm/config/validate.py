"""Rules between keys: everything that a single key's type cannot say, checked before any rank starts.

A rule is a function whose parameters name the groups it reads; it runs when all of them parsed, and yields problems.
The rules of each field stand in `eellm.config.rules`.
"""

from __future__ import annotations

import inspect
from typing import Any

from eellm.config.request import Request
from eellm.config.rules import (
    calibration,
    command,
    convert,
    data,
    decoding,
    harness,
    model,
    parallel,
    planning,
    reporting,
    schedule,
    serving,
    training,
    tuning,
)
from eellm.config.schema import Config
from eellm.errors import Problem

FIELDS = (
    model,
    parallel,
    schedule,
    data,
    training,
    decoding,
    calibration,
    harness,
    serving,
    tuning,
    convert,
    planning,
    reporting,
    command,
)
RULES = [rule for field in FIELDS for rule in field.RULES]
assert all(set(inspect.signature(rule).parameters) <= {*Config.model_fields, "groups", "request"} for rule in RULES)


def check(groups: dict[str, Any], request: Request) -> list[Problem]:
    """Run every rule whose groups are there. `groups` maps top-level keys to parsed nodes and scalars."""
    available = {**groups, "groups": groups, "request": request}
    problems: list[Problem] = []
    for rule in RULES:
        names = list(inspect.signature(rule).parameters)
        if all(name in available for name in names):
            problems += rule(*(available[name] for name in names))
    return problems
