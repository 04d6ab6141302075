"""The device profile that was measured: read when the config is composed, so that all that comes after sees plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from eellm.errors import ConfigError, Problem

FILE = "device_profile.yaml"
"""In the run directory of task=benchmark benchmark=planner."""
_MAKES_ONE = "device_profile.path=<run of task=benchmark benchmark=planner>"


def with_measured_profile(values: dict[str, Any]) -> dict[str, Any]:
    """Values with all of `device_profile` that its file has. Raises ConfigError where there is none."""
    profile = values.get("device_profile")
    if not isinstance(profile, dict) or "path" not in profile or "name" in profile:
        return values
    given = profile["path"]
    if given is None:
        raise ConfigError([Problem("device_profile.path", None, "device_profile=measured reads what was measured", _MAKES_ONE)])
    path = Path(str(given)).expanduser()
    file = path / FILE if path.is_dir() else path
    try:
        measured = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([Problem("device_profile.path", given, f"cannot be read: {error}", _MAKES_ONE)]) from None
    if not isinstance(measured, dict) or "timed" not in measured:
        raise ConfigError([Problem("device_profile.path", given, f"{file} is no measured profile", _MAKES_ONE)])
    return {**values, "device_profile": {**measured, "path": str(given)}}
