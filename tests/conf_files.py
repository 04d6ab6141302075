"""The files under conf/ as tests see them: where they stand, what they say, and the command at their top."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

CONF = Path(__file__).resolve().parents[1] / "conf"
RUN = "python run.py"


@dataclass(frozen=True)
class OptionFile:
    path: Path

    @property
    def name(self) -> str:
        """E.g. `model/tiny`."""
        return self.path.relative_to(CONF).with_suffix("").as_posix()

    @property
    def group(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines()

    @property
    def is_global(self) -> bool:
        return self.lines[0] == "# @package _global_"

    @property
    def command(self) -> str:
        return self.lines[1 if self.is_global else 0].removeprefix("# ")

    @property
    def own_values(self) -> dict[str, Any]:
        values = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        return {key: value for key, value in values.items() if key not in ("defaults", "hydra")}


def option_files() -> list[OptionFile]:
    return [OptionFile(path) for path in sorted(CONF.rglob("*.yaml")) if "machine" not in path.relative_to(CONF).parts]


def overrides_of(command: str) -> list[str]:
    """The arguments of a `python run.py` command, without flags."""
    assert command.startswith(RUN), command
    return [word for word in shlex.split(command.removeprefix(RUN), comments=True) if not word.startswith("-")]


def first_of_each_sweep(overrides: list[str]) -> list[str]:
    """What the first job of a sweep is given."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [
        f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}" if override.is_sweep_override() else text
        for override, text in zip(parsed, overrides, strict=True)
    ]


def flattened(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat.update(flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
