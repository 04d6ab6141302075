"""Plain values -> typed groups, with every unknown key, wrong type and wrong range reported at once."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from eellm.config.commandline import did_you_mean
from eellm.config.schema import Config, Node
from eellm.errors import Problem

Path = tuple[str | int, ...]

# keys that people look for, and what to tell them instead of "unknown"
_OUT_OF_SCOPE = (
    (re.compile(r"(cp|context)\b|(cp|context)_"), "context parallelism is out of scope"),
    (re.compile(r"(ep|etp|expert|moe)\b|(ep|etp|expert|experts|moe)_|num_experts"), "expert parallelism is out of scope"),
    (re.compile(r"encoder"), "encoder-decoder models are out of scope"),
)
_NOT_PACKAGED = ("experiment", "study", "machine")
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list [a,b,...]",
    "model": "a group of keys",
    "dict": "a group of keys",
    "none": "null",
}


@dataclass(frozen=True)
class Parsed:
    """`groups` holds those top-level values that parsed: nodes and scalars by their key."""

    groups: dict[str, Any]
    problems: list[Problem]


def parse(values: dict[str, Any]) -> Parsed:
    """Check plain values against the schema. Unknown keys are reported and then left aside."""
    try:
        config = Config.model_validate(values)
        return Parsed({name: getattr(config, name) for name in Config.model_fields}, [])
    except ValidationError as error:
        errors = error.errors()
    values = copy.deepcopy(values)
    problems, broken = [], set()
    by_path: dict[Path, list[Any]] = {}
    for entry in errors:
        by_path.setdefault(_path_in(values, entry["loc"], entry["type"]), []).append(entry)
    for path, entries in by_path.items():
        if entries[0]["type"] == "extra_forbidden":
            problems.append(_unknown_key(path, _value_at(values, path)))
        else:
            problems.append(_wrong_value(path, values, entries))
            broken.add(path[0])
    for path, entries in by_path.items():
        if entries[0]["type"] == "extra_forbidden":
            del _value_at(values, path[:-1])[path[-1]]
    groups = {
        name: TypeAdapter(field.rebuild_annotation()).validate_python(values[name])
        for name, field in Config.model_fields.items()
        if name not in broken
    }
    return Parsed(groups, problems)


def known_keys(node: type[Node] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema that holds a value."""
    keys = []
    for name, field in node.model_fields.items():
        child = _node_of(field)
        keys += known_keys(child, f"{prefix}{name}.") if child else [f"{prefix}{name}"]
    return keys


def dotted(path: Iterable[str | int]) -> str:
    """('exits', 'layers', 1) -> exits.layers[1]"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _path_in(values: Any, location: Path, kind: str) -> Path:
    """The part of pydantic's location that is a path in the values; the rest names members of unions."""
    path: list[str | int] = []
    for part in location:
        inside = (isinstance(values, dict) and part in values) or (isinstance(values, list) and isinstance(part, int))
        if not inside:
            if kind == "missing" and part == location[-1]:
                path.append(part)
            break
        path.append(part)
        values = values[part]
    return tuple(path)


def _value_at(values: Any, path: Path) -> Any:
    for part in path:
        values = values[part]
    return values


def _node_of(field: FieldInfo | None) -> type[Node] | None:
    candidates = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Node)), None)


def _field_at(path: Path) -> tuple[type[Node], FieldInfo | None]:
    """The deepest node on the way to a path, and the field that the path names in it."""
    node: type[Node] = Config
    field: FieldInfo | None = None
    for part in path:
        if not isinstance(part, str):
            break
        field = node.model_fields.get(part)
        child = _node_of(field)
        if child is None:
            return node, field
        node = child
    return node, field


def _unknown_key(path: Path, value: Any) -> Problem:
    key = str(path[-1])
    where = dotted(path[:-1])
    for pattern, reason in _OUT_OF_SCOPE:
        if where in ("parallel", "model", "") and pattern.match(key):
            return Problem(dotted(path), value, reason, "leave it out; the layouts are parallel.tp, .pp, .vp and .dp")
    if path[0] in _NOT_PACKAGED and isinstance(value, dict):
        fix = "the file's first line, before any comment, must be: # @package _global_"
        return Problem(dotted(path), value, f"the values of a file under conf/{path[0]} ended up under `{path[0]}`", fix)
    siblings = _field_at(path[:-1])[0].model_fields
    full = _named_elsewhere(key)
    if full is None:
        guess = did_you_mean(key, list(siblings), cutoff=0.7) or _described_as(key, siblings)
        full = (f"{where}.{guess}" if where else guess) if guess else _named_elsewhere(key, cutoff=0.8)
    if full:
        return Problem(dotted(path), value, "unknown key", f"did you mean {full}?")
    of = f"the keys of {where}" if where else "the keys"
    return Problem(dotted(path), value, "unknown key", f"{of} are {', '.join(siblings)}")


def _described_as(key: str, siblings: dict[str, FieldInfo]) -> str | None:
    """`learning_rate` -> `lr`, whose description has these words."""
    words = re.compile(rf"\b{re.escape(key.replace('_', ' '))}\b", re.IGNORECASE)
    return next((name for name, field in siblings.items() if words.search(field.description or "")), None)


def _named_elsewhere(key: str, cutoff: float = 1.0) -> str | None:
    """A key of any group with this name, or nearly this name."""
    names = {known.rpartition(".")[2]: known for known in reversed(known_keys())}
    return names.get(did_you_mean(key, list(names), cutoff) or "")


def _wrong_value(path: Path, values: dict[str, Any], entries: list[Any]) -> Problem:
    _, field = _field_at(path)
    about = f" ({field.description})" if field is not None and field.description else ""
    if entries[0]["type"] == "missing":
        return Problem(dotted(path), None, "is missing", f"give it a value{about}")
    value = _value_at(values, path)
    if value == "???":
        return Problem(dotted(path), value, "has no default", f"give it on the command line{about}")
    if path[0] in Config.model_fields and len(path) == 1 and _node_of(Config.model_fields[str(path[0])]):
        return Problem(dotted(path), value, "is a group, not a value", f"set its keys, e.g. {_first_key(str(path[0]))}=...")
    wanted = list(dict.fromkeys(_expectation(entry) for entry in entries))
    literals = [option for entry in entries for option in _literals(entry)]
    guess = did_you_mean(str(value), literals)
    fix = f"did you mean {guess}?" if guess else f"give {' or '.join(wanted)}"
    return Problem(dotted(path), value, f"must be {' or '.join(wanted)}", fix + about)


def _first_key(group: str) -> str:
    return next(key for key in known_keys() if key.startswith(f"{group}."))


def _literals(entry: Any) -> list[str]:
    return re.findall(r"'([^']*)'", entry["ctx"]["expected"]) if entry["type"] == "literal_error" else []


def _expectation(entry: Any) -> str:
    kind, context = entry["type"], entry.get("ctx", {})
    if kind == "literal_error":
        return "one of " + ", ".join(_literals(entry))
    if kind == "greater_than_equal":
        return f"a number, at least {context['ge']:g}"
    if kind == "greater_than":
        return f"a number greater than {context['gt']:g}"
    if kind == "less_than_equal":
        return f"a number, at most {context['le']:g}"
    if kind == "string_pattern_mismatch":
        return "letters, digits and any of . _ - (it names a folder)"
    return _EXPECTED.get(kind.split("_")[0], entry["msg"])
