"""The grammar of the command line: which arguments choose an option of a group and which set a value.

Hydra refuses an unknown key by itself, one at a time. Values are therefore handed to it as `++key=value`, which sets
any key, and `eellm.config.parse` reports all unknown ones together.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from eellm.errors import ConfigError, Problem

CONF = Path(__file__).resolve().parents[2] / "conf"
"""The configuration files; eellm is used from a checkout."""

_PLUGINS = {"optuna": "sweeps", "joblib": "sweeps", "submitit": "slurm"}
"""Hydra's sweepers and launchers that an extra installs, by the beginning of their options' names."""

_ASSIGNMENT = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[A-Za-z_][\w./@:-]*)(=(?P<value>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """One argument `key=value` (or `+key`, `++key`, `~key`); `text` is what was typed."""

    text: str
    sign: str
    key: str

    @property
    def group(self) -> str:
        """Top-level key that it changes."""
        return re.split(r"[./@]", self.key)[0]

    @property
    def chooses_option(self) -> bool:
        """`model=tiny` as against `model.num_layers=8`."""
        return "/" in self.key or "@" in self.key or self.key in config_groups()


@cache
def config_groups() -> frozenset[str]:
    """Names of the folders under conf/, e.g. `model`."""
    return frozenset(folder.relative_to(CONF).as_posix() for folder in CONF.rglob("*") if folder.is_dir())


def parse_override(text: str) -> Override | None:
    """None for what is not an override: flags and their values."""
    match = _ASSIGNMENT.fullmatch(text)
    if match is None or (match["value"] is None and match["sign"] is None):
        return None
    return Override(text, match["sign"] or "", match["key"])


def prepared_groups(overrides: Iterable[Override]) -> set[str]:
    """Groups that the experiments and studies named on the command line set, or choose an option of."""
    named = [(override.key, override.text.partition("=")[2]) for override in overrides if override.key in ("experiment", "study")]
    return set().union(*(_groups_in(kind, name) for kind, names in named for name in names.strip("[]").split(",")))


def _groups_in(kind: str, name: str) -> set[str]:
    files = [folder / kind / f"{name.strip()}.yaml" for folder in _config_folders()]
    file = next((file for file in files if file.is_file()), None)
    content = {} if file is None else yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    groups = set(content) - {"defaults"}
    for entry in content.get("defaults", []):
        if isinstance(entry, dict):  # `override /exits: quarter_half`
            groups |= {re.split(r"[/@]", key.removeprefix("override ").strip().lstrip("/"))[0] for key in entry}
        elif entry != "_self_":
            groups |= _groups_in(kind, entry)
    return groups


def _config_folders() -> list[Path]:
    """conf/ and what --config-dir and hydra.searchpath add to it."""
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    return [CONF, *(Path(source.path) for source in sources if source.schema == "file")]


def forced(arguments: list[str]) -> list[str]:
    """The arguments with every plain value override `a.b=x` turned into `++a.b=x`."""
    return [f"++{argument}" if _is_plain_value(parse_override(argument)) else argument for argument in arguments]


def as_typed(override: str) -> str:
    """Undo `forced`."""
    return override.removeprefix("++")


def _is_plain_value(override: Override | None) -> bool:
    return override is not None and not override.sign and override.group != "hydra" and not override.chooses_option


def did_you_mean(word: str, known: list[str], cutoff: float = 0.6) -> str | None:
    """The closest known word, if one is close."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def explained(error: Exception) -> ConfigError:
    """What Hydra or OmegaConf raised while composing (`composing_errors`), as a problem to show."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        guess = did_you_mean(option, list(error.options))
        fix = f"choose one of {', '.join(error.options)}" + (f"; did you mean {group}={guess}?" if guess else "")
        extra = next((extra for plugin, extra in _PLUGINS.items() if option.startswith(plugin)), None)
        if group.startswith("hydra/") and extra is not None:
            fix = f"install Hydra's plugin: pip install 'eellm[{extra}]'"
        return ConfigError([Problem(group, option, "there is no such option", fix)])
    if isinstance(error, OverrideParseException):
        reason = str(error).splitlines()[0]
        fix = "quote what the shell or Hydra would read otherwise, e.g. 'exits.layers=[2,4]' or 'decoding.prompts=[\"a, b\"]'"
        path, _, value = as_typed(error.override or "").partition("=")
        return ConfigError([Problem(path, value, reason, fix)])
    lines = [str(part) for part in (error, error.__cause__) if part is not None and str(part)]
    reason = " ".join(" ".join(lines).split()).replace("'++", "'")
    return ConfigError([Problem("configuration", "", reason, "see `python run.py --help` for the groups and their options")])


def composing_errors() -> tuple[type[Exception], ...]:
    """What Hydra and OmegaConf raise at a user's mistake; ValueError for `model=3`."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return (HydraException, OmegaConfBaseException, ValueError)
