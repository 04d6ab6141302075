"""A small early-exit model that comes with eellm: what tasks read that need a trained model and are given none.

`run/` is a run directory as `experiment=reference_model` leaves it, with the weights alone, in bf16; MODEL_CARD.md says
what it was trained on and what it can do. `experiments/reference_model/pack.py` makes it out of such a run.
"""

from __future__ import annotations

from pathlib import Path

NAME = "reference"
"""`checkpoint=reference` names it."""


def reference_run() -> Path:
    """Its run directory."""
    return Path(__file__).parent / "run"
