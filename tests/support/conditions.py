"""Waiting for a condition, which fails the test when it takes too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


def until(holds: Callable[[], object], seconds: float = 120.0, pause: float = 0.02) -> None:
    """Return as soon as the condition holds. `pause`: seconds between two looks."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(pause)


async def eventually(holds: Callable[[], object], seconds: float = 30.0) -> None:
    """Return as soon as the condition holds, and let the event loop run meanwhile."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)
