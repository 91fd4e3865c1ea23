"""A lock that is never released: the event loop waits for it, and only the end of the process helps."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import httpx
import pytest

from service.server.process import STUCK
from tests.faults import times
from tests.support.service.faulty_service import KINDS, Breaking


@pytest.mark.parametrize("_", range(times(5, 1)))
def test_a_lock_that_is_never_released_ends_the_process(tmp_path: Path, _: int) -> None:
    service = Breaking(tmp_path, {"service.monitoring.loop_watchdog": {"_TURN_SECONDS": times(10, 4)}})
    try:
        service.ask("lock", "text")
        begun = time.monotonic()
        with contextlib.suppress(httpx.HTTPError):
            body = {"backbone": KINDS["text"], "inputs": [{"text": "a"}]}
            httpx.post(f"{service.url}/embed", json=body, timeout=30)
        assert service.process.wait(20) == STUCK
        assert time.monotonic() - begun < 15.0
        assert "the event loop has not turned for" in service.log.read_text()
    finally:
        service.kill()
