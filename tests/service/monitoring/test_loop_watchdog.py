"""An event loop that stands still ends the process."""

from __future__ import annotations

import threading
import time

import pytest

from service.monitoring.loop_watchdog import LoopWatchdog


def test_a_loop_that_does_not_turn_ends_the_process_after_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.monitoring.loop_watchdog._TURN_SECONDS", 0.3)
    monkeypatch.setattr("service.monitoring.loop_watchdog._WATCH_SECONDS", 0.05)
    ended: list[str] = []
    done = threading.Event()

    def end(why: str) -> None:
        ended.append(why)
        watchdog.close()
        done.set()

    watchdog = LoopWatchdog(end)  # type: ignore[arg-type]
    watchdog.start()
    for _ in range(20):
        watchdog.turn()
        time.sleep(0.05)
    assert not ended
    assert done.wait(5.0)
    assert ended[0].startswith("the event loop has not turned for 0.")
