"""Fixtures for every test: the real databases and stores, and one running service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

# Before any test imports ONNX Runtime itself, which this keeps from reporting.
import models  # noqa: F401
from benchmarks.harness.service_process import Serving

pytest_plugins = ["tests.support.storage"]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """asyncio is what the service runs on."""
    return "asyncio"


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A running service with both packaged backbones and an empty home; the first time, they are exported."""
    with Serving(tmp_path_factory.mktemp("serving")) as running:
        yield running


@pytest.fixture(scope="session")
def server(serving: Serving) -> str:
    """URL of the running service. Shared by all tests: name adapters, or the tenant, after the test."""
    return serving.url
