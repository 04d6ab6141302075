"""One model and one server for all tests that need no limits of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.service import Loaded, Service, loaded, service

TEMPLATE = "{% for message in messages %}# {{ message.role }}: {{ message.content | trim }}\n{% endfor %}def "


@pytest.fixture(scope="package")
def model() -> Iterator[Loaded]:
    with loaded() as found:
        yield found


@pytest.fixture(scope="package")
def served(model: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("served")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    with service(
        model, folder / "run", f"serve.chat_template={template}", "decoding.max_batch=4", "decoding.draft_length=3"
    ) as running:
        yield running
