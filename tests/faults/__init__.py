"""Promises for faults: every run tests a slice of each, `make test-faults` all of it."""

from __future__ import annotations

import os


def times(full: int, usual: int) -> int:
    """How often something is tried: `full` times with TOPWORK_TEST_FAULTS=full, else `usual` times."""
    return full if os.environ.get("TOPWORK_TEST_FAULTS") == "full" else usual
