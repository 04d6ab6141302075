"""calibration.json: which thresholds were certified, for which model and on which text; and what decoding takes from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eellm.config.schema import ExitPolicyConfig
from eellm.data.cache import write_atomically
from eellm.errors import CheckpointError
from eellm.rundir import RunDirectory, step_of, whole_checkpoint

Threshold = float | list[float] | None
"""Of all active exits, or one per active exit; None = never exit."""


@dataclass(frozen=True)
class TrainedModel:
    """The weights that were calibrated, and the number format that they ran in."""

    run: str
    fingerprint: str
    step: int
    dtype: str

    def is_same(self, other: TrainedModel) -> bool:
        """Wherever the runs lie: the fingerprint of what was trained, the step and the format say which model it is."""
        return (self.fingerprint, self.step, self.dtype) == (other.fingerprint, other.step, other.dtype)

    def __str__(self) -> str:
        return f"{self.run} at step {self.step} in {self.dtype} (fingerprint {self.fingerprint})"


@dataclass(frozen=True)
class HeldOutText:
    """The text that the sequences were drawn from: fingerprint of the tokenised corpus, its split, how it was cut."""

    fingerprint: str
    split: list[float]
    sequence_length: int
    document_boundaries: str


@dataclass(frozen=True)
class ThresholdTest:
    """One threshold: the risk measured, the p-value of "it exceeds epsilon", and what exiting there saves.

    `mean_layers` per token and `shares` of tokens by head, on the text that was read; `speedup` is the model's layers over
    `mean_layers`, which leaves out what the exits' heads cost.
    """

    threshold: Threshold
    risk: float
    p_value: float
    certified: bool
    mean_layers: float
    speedup: float
    shares: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """`tests` in the order in which they were made; the first is `never`, which needs none.

    With probability 1 - `delta` over the draw of the `sequences`, no certified threshold has a `risk` above `epsilon`.
    """

    risk: str
    epsilon: float
    delta: float
    active: list[int]
    sequences: int
    tokens: int
    tests: list[ThresholdTest]
    model: TrainedModel
    data: HeldOutText

    @property
    def chosen(self) -> ThresholdTest:
        """The last threshold certified, where tokens leave earliest."""
        return [test for test in self.tests if test.certified][-1]

    def save(self, path: Path) -> None:
        """Write as JSON, with the threshold chosen and what is expected of it in front."""
        write_atomically(path, json.dumps({"chosen": asdict(self.chosen), **asdict(self)}, indent=2) + "\n")

    @classmethod
    def of(cls, values: dict[str, Any]) -> Calibration:
        """Inverse of `save`. Raises KeyError, TypeError or AttributeError for anything else."""
        fields = {name: value for name, value in values.items() if name != "chosen"}
        fields["tests"] = [ThresholdTest(**test) for test in values["tests"]]
        return cls(**{**fields, "model": TrainedModel(**values["model"]), "data": HeldOutText(**values["data"])})


def read_calibration(given: str) -> Calibration:
    """The calibration that a path names: a run of task=calibrate, or its calibration.json. Raises CheckpointError."""
    path = Path(given).expanduser()
    if path.is_dir():
        path = RunDirectory(path).calibration
    try:
        return Calibration.of(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not what task=calibrate writes ({type(error).__name__}: {error})") from error


def trained_model(checkpoint: str, dtype: str) -> TrainedModel:
    """The model that `checkpoint=` names. Raises CheckpointError where there is none, or nothing that says which it is."""
    run, step = whole_checkpoint("checkpoint", checkpoint)
    fingerprint = run.status().get("fingerprint")
    if not isinstance(fingerprint, str):
        raise CheckpointError(f"checkpoint={checkpoint}: {run.status_file} names no fingerprint of what was trained.")
    return TrainedModel(str(run.path), fingerprint, step_of(step), dtype)


def calibrated(policy: ExitPolicyConfig) -> ExitPolicyConfig:
    """The policy with the thresholds and exits of the calibration that it names; as it is where it names none."""
    if policy.calibration is None:
        return policy
    found = read_calibration(policy.calibration)
    if found.chosen.threshold is None:
        return policy.model_copy(update={"kind": "never"})
    return policy.model_copy(update={"threshold": found.chosen.threshold, "active": found.active})
