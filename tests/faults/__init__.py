"""What is promised of when things break: a slice of each in every run, all of it by `make test-faults`."""

from __future__ import annotations

import os


def times(full: int, usual: int) -> int:
    """How often something is tried: `full` times with TOPWORK_TEST_FAULTS=full, else `usual` times."""
    return full if os.environ.get("TOPWORK_TEST_FAULTS") == "full" else usual
