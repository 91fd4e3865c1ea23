"""Detects hung child processes: a healthy one sends a heartbeat every second, or at least uses the CPU."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from models.priority import ProcessCpuClock

BEAT_SECONDS = 1.0  # between heartbeats
LOOK_SECONDS = 0.5  # between looks for heartbeats
# Seconds of silence after which an idle child is taken for dead: five, with the look that finds it.
_SILENT_SECONDS = 4.5
# Seconds of silence after which a child is taken for dead even if it uses the CPU. No call holds the
# interpreter for a minute.
_LONGEST_SECONDS = 60.0
# CPU seconds since the last heartbeat that count as work. A thread that wakes up for nothing uses less.
_WORK_SECONDS = 0.01
# Least CPU seconds that a computing thread uses between two heartbeats, on the busiest machine.
_LEAST_SECONDS = 1e-4


class HeartbeatMonitor:
    """Tracks a child's heartbeats. For one thread, except `beat`, which is thread-safe.

    Each look counts for at most twice LOOK_SECONDS. So a child is not taken for dead after this process was
    suspended together with it, or had no core.
    """

    def __init__(self, pid: int) -> None:
        self._beats = 0
        self._cpu = ProcessCpuClock(pid)
        self._heard = -1
        self._used = 0.0
        self._silent = 0.0
        self._looked = time.monotonic()

    def beat(self) -> None:
        """Record a heartbeat of the child."""
        self._beats += 1

    def look(self) -> float | None:
        """Return the seconds of silence if the child must be taken for dead, else None.

        A child whose interpreter is blocked by a long call, such as loading a library, still uses the CPU.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * LOOK_SECONDS), now
        if self._beats != self._heard:
            self._heard, self._used, self._silent = self._beats, self._cpu.seconds(), 0.0
            return None
        self._silent += passed
        if self._silent < _SILENT_SECONDS:
            return None
        computes = self._cpu.seconds() - self._used > _WORK_SECONDS
        return None if computes and self._silent < _LONGEST_SECONDS else self._silent


def start_heartbeat(tell: Callable[[], object], lives: Callable[[], bool] = lambda: True) -> None:
    """Call `tell` every second from a background thread, skipping it while `lives()` is false.

    The thread ends when `tell` raises OSError: the other end of the pipe has gone.
    """

    def go_on() -> None:
        while True:
            try:
                if lives():
                    tell()
            except OSError:
                return
            time.sleep(BEAT_SECONDS)

    threading.Thread(target=go_on, name="pulse", daemon=True).start()


class ProgressClock:
    """Tells whether a thread is idle or uses the CPU. A deadlocked thread does neither.

    Create it in that thread, which sets `idle`.
    """

    def __init__(self) -> None:
        self.idle = True
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._used = -1.0

    def made(self) -> bool:
        """Return whether the thread is idle, or has used the CPU since the last call."""
        before, self._used = self._used, time.clock_gettime(self._clock)
        return self.idle or self._used - before > _LEAST_SECONDS


def drain(pipe: int) -> bool:
    """Empty a non-blocking pipe of heartbeats; return whether there were any."""
    try:
        return bool(os.read(pipe, 4096))
    except BlockingIOError:
        return False
