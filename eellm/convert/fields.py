"""What one of our model's keys and a field of `transformers`' config.json have to do with each other, in both directions.

A field reads config.json into our keys and writes our keys, every null of theirs resolved, into config.json. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Json = Mapping[str, Any]


class Unsupported(Exception):
    """A field of config.json, or one of our keys on the way back, that the other side has no counterpart for."""

    def __init__(self, field_: str, value: object, reason: str):
        super().__init__(f"{field_}={value!r}: {reason}")
        self.field, self.value, self.reason = field_, value, reason


class Field(Protocol):
    def read(self, config: Json) -> dict[str, Any]:
        """Our keys. Raises Unsupported."""
        ...

    def write(self, model: Json) -> dict[str, Any]:
        """Their fields. What they cannot say is found by reading it back (`families.family_of`)."""
        ...


_REQUIRED: Any = object()


@dataclass(frozen=True)
class Named:
    """The same value under two names. `default` is what an absent field means; a function of config.json, what null means too."""

    ours: str
    theirs: str
    default: Any = _REQUIRED

    def read(self, config: Json) -> dict[str, Any]:
        value = config.get(self.theirs, self.default)
        if value is None and callable(self.default):
            value = self.default
        if value is _REQUIRED:
            raise Unsupported(self.theirs, None, "config.json lacks it")
        return {self.ours: value(config) if callable(value) else value}

    def write(self, model: Json) -> dict[str, Any]:
        return {self.theirs: model[self.ours]}


@dataclass(frozen=True)
class Choice:
    """Values that have other names: theirs -> ours. Of several with one meaning the first is written."""

    ours: str
    theirs: str
    values: Mapping[Any, Any]
    default: Any

    def read(self, config: Json) -> dict[str, Any]:
        value = config.get(self.theirs, self.default)
        if value not in self.values:
            raise Unsupported(self.theirs, value, f"only {', '.join(map(str, self.values))} can be computed")
        return {self.ours: self.values[value]}

    def write(self, model: Json) -> dict[str, Any]:
        names = [theirs for theirs, ours in self.values.items() if ours == model[self.ours]]
        return {self.theirs: names[0]} if names else {}


@dataclass(frozen=True)
class Always:
    """One of our keys that the architecture decides."""

    ours: str
    value: Any

    def read(self, config: Json) -> dict[str, Any]:
        return {self.ours: self.value}

    def write(self, model: Json) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Derived:
    """One of our keys that follows from other fields."""

    ours: str
    value: Callable[[Json], Any]

    def read(self, config: Json) -> dict[str, Any]:
        return {self.ours: self.value(config)}

    def write(self, model: Json) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Only:
    """A field with one value that we can compute, which is also what its absence means."""

    theirs: str
    value: Any

    def read(self, config: Json) -> dict[str, Any]:
        found = config.get(self.theirs, self.value)
        if found is not None and found != self.value:
            raise Unsupported(self.theirs, found, f"only {self.value} can be computed")
        return {}

    def write(self, model: Json) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Absent:
    """Fields of what no family here has: experts, soft-capped logits, quantised weights."""

    theirs: tuple[str, ...]

    def read(self, config: Json) -> dict[str, Any]:
        for name in self.theirs:
            if config.get(name):
                raise Unsupported(name, config[name], "is not supported")
        return {}

    def write(self, model: Json) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Biases:
    """Llama's two switches, which for us are one."""

    def read(self, config: Json) -> dict[str, Any]:
        attention, mlp = bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False))
        if attention != mlp:
            raise Unsupported("attention_bias", attention, f"biases in attention and MLP must go together (mlp_bias={mlp})")
        return {"qkv_bias": attention, "linear_bias": mlp}

    def write(self, model: Json) -> dict[str, Any]:
        return {"attention_bias": model["linear_bias"], "mlp_bias": model["linear_bias"]}


@dataclass(frozen=True)
class Window:
    """A sliding window for all layers or none. `switch`: the field that turns it on (Qwen); None: its size does."""

    switch: str | None = None

    def read(self, config: Json) -> dict[str, Any]:
        kinds = set(config.get("layer_types") or ())
        if len(kinds) > 1:
            raise Unsupported("layer_types", sorted(kinds), "all layers must attend alike")
        if kinds - {"full_attention", "sliding_attention"}:
            raise Unsupported("layer_types", sorted(kinds), "only full and sliding attention can be computed")
        window = config.get("sliding_window", 4096)
        if self.switch is None or not config.get(self.switch, False):
            return {"sliding_window": window if self.switch is None else None}
        first, layers = config.get("max_window_layers", 28), config["num_hidden_layers"]
        if not kinds and 0 < first < layers:
            reason = f"all of the {layers} layers must have the window, or none"
            raise Unsupported("max_window_layers", first, reason)
        everywhere = kinds == {"sliding_attention"} if kinds else first <= 0
        return {"sliding_window": window if everywhere else None}

    def write(self, model: Json) -> dict[str, Any]:
        window = model["sliding_window"]
        if self.switch is None:
            return {"sliding_window": window}
        on = {"sliding_window": window, "max_window_layers": 0} if window is not None else {}
        return {self.switch: window is not None, **on}


_LLAMA3 = {
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}


@dataclass(frozen=True)
class Rotary:
    """Rotary positions as config.json has them: `rope_parameters` since transformers 5, before that a field for each.

    `fraction`: the field with the share of the channels that rotate; None: all do.
    """

    base: str = "rope_theta"
    fraction: str | None = None
    default_fraction: float = 1.0
    read_keys: tuple[str, ...] = field(default=("rope_parameters", "rope_scaling"))

    def read(self, config: Json) -> dict[str, Any]:
        name = next((key for key in self.read_keys if config.get(key)), self.read_keys[0])
        parameters = config.get(name) or {}
        if any(isinstance(value, Mapping) for value in parameters.values()):
            raise Unsupported(name, sorted(parameters), "all layers must rotate alike")
        old = None if self.fraction is None else config.get(self.fraction)
        fraction = parameters.get("partial_rotary_factor", self.default_fraction if old is None else old)
        if self.fraction is None and fraction != 1.0:
            raise Unsupported("partial_rotary_factor", fraction, "all channels rotate in this family")
        return {
            "position": "rotary",
            "rotary_base": float(parameters.get("rope_theta") or config.get(self.base) or 10000.0),
            "rotary_fraction": fraction,
            "rotary_scaling": self._scaling(name, parameters, config),
        }

    def _scaling(self, name: str, parameters: Json, config: Json) -> dict[str, Any] | None:
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind == "default":
            return None
        if kind not in ("linear", "llama3"):
            raise Unsupported(f"{name}.rope_type", kind, "only default, linear and llama3 can be computed")
        own = dict.fromkeys(_LLAMA3)
        if kind == "llama3":
            own = {ours: parameters.get(theirs) for ours, theirs in _LLAMA3.items()}
            own["original_positions"] = own["original_positions"] or config.get("max_position_embeddings")
        return {"kind": kind, "factor": parameters.get("factor"), **own}

    def write(self, model: Json) -> dict[str, Any]:
        scaling = model["rotary_scaling"]
        if scaling is not None:
            own = {theirs: scaling[ours] for ours, theirs in _LLAMA3.items()} if scaling["kind"] == "llama3" else {}
            scaling = {"rope_type": scaling["kind"], "factor": scaling["factor"], **own}
        fraction = {} if self.fraction is None else {self.fraction: model["rotary_fraction"]}
        return {self.base: model["rotary_base"], "rope_scaling": scaling, **fraction}


@dataclass(frozen=True)
class LearnedPositions:
    """A table of positions, and so nothing that rotates."""

    def read(self, config: Json) -> dict[str, Any]:
        return {"position": "learned", "rotary_base": 10000.0, "rotary_fraction": 1.0, "rotary_scaling": None}

    def write(self, model: Json) -> dict[str, Any]:
        return {}
