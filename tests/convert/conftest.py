"""Code that comes with models is copied into a folder of the tests' own, not into the user's cache."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest


@pytest.fixture(scope="session", autouse=True)
def modules_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = str(tmp_path_factory.mktemp("modules"))
    with mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder):
        yield
