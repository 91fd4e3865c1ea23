"""A thread that ends the process if the event loop stands still."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NoReturn

from adapters.processes.heartbeat import ElapsedTime

_TURN_SECONDS = 10.0  # without a turn of the event loop, after which the process ends
_WATCH_SECONDS = 0.5  # between checks of the event loop


class LoopWatchdog:
    """A thread that ends the process if the event loop has not turned for ten seconds.

    Nothing is answered then, and no code in the loop can help. Time is counted as this thread sees it pass,
    so that a process that was stopped is not ended for that.
    """

    def __init__(self, end: Callable[[str], NoReturn]) -> None:
        self._end = end
        self._turns = 0
        self._closing = threading.Event()

    def start(self) -> None:
        """Start the thread; from now on the loop must call `turn`."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def turn(self) -> None:
        """Record a turn of the loop."""
        self._turns += 1

    def close(self) -> None:
        """Stop the thread."""
        self._closing.set()

    def _watch(self) -> None:
        seen, still, elapsed = self._turns, 0.0, ElapsedTime(2 * _WATCH_SECONDS)
        while not self._closing.wait(_WATCH_SECONDS):
            passed = elapsed.lap()
            still = 0.0 if self._turns != seen else still + passed
            seen = self._turns
            if still > _TURN_SECONDS:
                self._end(f"the event loop has not turned for {still:.1f} s")
