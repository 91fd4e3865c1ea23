"""Fixtures for every test: the real databases and stores, and one running service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any test imports ONNX Runtime itself, which this keeps from reporting.
import models  # noqa: F401
from benchmarks.harness.service_process import Serving

# The service sets this too: spinning BLAS threads would take the cores of other tests. numpy reads it once.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

pytest_plugins = ["tests.support.storage"]

# Files that take minutes. Parallel workers begin with them, so that none is left to the end.
LONGEST = (
    "tests/service/api/prediction/test_export_program.py",
    "tests/models/export/test_onnx_export.py",
    "tests/adapters/registry/test_registry.py",
    "tests/faults/process/test_rollback_kills.py",
    "tests/faults/process/test_failpoints.py",
    "tests/adapters/probe/test_regression.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the longest files to the front."""
    order = {config.rootpath / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(Path(item.path), len(order)))


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
