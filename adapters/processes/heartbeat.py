"""Detects hung child processes: a healthy one sends a heartbeat every second, or at least uses the CPU."""

from __future__ import annotations

import contextlib
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


class ElapsedTime:
    """Measures time in laps, each of which counts for at most `longest` seconds.

    So time in which this process was suspended, or had no core, hardly counts. For one thread.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._looked = time.monotonic()

    def lap(self) -> float:
        """Return the seconds since the last call, or since the start, at most `longest`."""
        before, self._looked = self._looked, time.monotonic()
        return min(self._looked - before, self._longest)


class HeartbeatMonitor:
    """Tracks a child's heartbeats. For one thread, except `beat`, which is thread-safe.

    A child is not taken for dead after this process was suspended together with it: see ElapsedTime.
    """

    def __init__(self, pid: int) -> None:
        self._beats = 0
        self._cpu = ProcessCpuClock(pid)
        self._heard = -1
        self._used = 0.0
        self._silent = 0.0
        self._elapsed = ElapsedTime(2 * LOOK_SECONDS)

    def beat(self) -> None:
        """Record a heartbeat of the child."""
        self._beats += 1

    def look(self) -> float | None:
        """Return the seconds of silence if the child must be taken for dead, else None.

        A child whose interpreter is blocked by a long call, such as loading a library, still uses the CPU.
        """
        passed = self._elapsed.lap()
        if self._beats != self._heard:
            self._heard, self._used, self._silent = self._beats, self._cpu.seconds(), 0.0
            return None
        self._silent += passed
        if self._silent < _SILENT_SECONDS:
            return None
        computes = self._cpu.seconds() - self._used > _WORK_SECONDS
        return None if computes and self._silent < _LONGEST_SECONDS else self._silent


def start_heartbeat(pipe: int, lives: Callable[[], bool] = lambda: True) -> None:
    """Write to the pipe every second from a background thread, except while `lives()` is false.

    `pipe`: the descriptor that a ChildProcess gets as first argument. The thread ends with the pipe's reader.
    """
    # A process that this one starts must not hold the pipe.
    os.set_inheritable(pipe, False)

    def beat() -> None:
        with contextlib.suppress(OSError):
            while True:
                if lives():
                    os.write(pipe, b".")
                time.sleep(BEAT_SECONDS)

    threading.Thread(target=beat, name="pulse", daemon=True).start()


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
