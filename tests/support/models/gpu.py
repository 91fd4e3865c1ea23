"""Detection of a GPU, for tests that need one."""

from __future__ import annotations

import os

import pytest

from models.runtime.driver import gpu_name


def require_gpu() -> None:
    """Skips the test where there is no GPU, and fails it where TOPWORK_TEST_REQUIRE asks for one."""
    if gpu_name() is not None:
        return
    if "gpu" in os.environ.get("TOPWORK_TEST_REQUIRE", "").split(","):
        pytest.fail("a GPU is required, and the driver finds none")
    pytest.skip("there is no GPU here")
