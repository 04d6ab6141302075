"""Settings as a list in columns, by group."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from eellm.drawing.number_text import MISSING

UNGROUPED = "run"


def settings_list(values: Mapping[str, Any]) -> str:
    """`values`: by their dotted names."""
    groups: dict[str, dict[str, Any]] = {UNGROUPED: {}}
    for name, value in values.items():
        group, _, key = name.partition(".")
        groups.setdefault(group if key else UNGROUPED, {})[key or group] = value
    blocks = []
    for name, entries in groups.items():
        lines = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(_text(value))}</dd></div>" for key, value in entries.items())
        blocks.append(f"<section><h3>{escape(name)}</h3><dl>{lines}</dl></section>" if entries else "")
    return f'<div class="settings card">{"".join(blocks)}</div>'


def leaves(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _text(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or MISSING
    return f"{value:g}" if isinstance(value, float) else str(value)
