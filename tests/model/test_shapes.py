"""Names and shapes from the description alone are those of the stage that is built."""

from __future__ import annotations

import pytest

from eellm.model.shapes import parameter_shapes
from tests import workers
from tests.decoding.models import parameters, spec
from tests.decoding.test_lean_layer import FAMILIES, HEADS


@pytest.mark.dist
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family: str, tied: bool) -> None:
    model = spec(**FAMILIES[family], exits=HEADS, tie_embeddings=tied)
    built = workers.run(1, parameters, model)[0]
    assert parameter_shapes(model) == {name: value.shape for name, value in built.items()}
