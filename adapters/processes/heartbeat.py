"""Whether a process that was started here still gets on: it beats each second, or at least computes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from models.priority import ProcessCpuClock

BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.5
# Without a sign of life; with the look that finds it, five seconds.
_SILENT_SECONDS = 4.5
# Whatever it computes meanwhile: nothing holds the interpreter for so long.
_LONGEST_SECONDS = 60.0
# CPU time since the last beat that is more than a thread's waking up for nothing.
_WORK_SECONDS = 0.01
# Of a thread that computes, from one beat to the next, on the busiest machine.
_LEAST_SECONDS = 1e-4


class HeartbeatMonitor:
    """What is known of a child's life. For one thread, but for `beat`, which any may call.

    Time is that between looks, as far as they came: one who was stopped together with the child, or starved,
    does not take it for dead.
    """

    def __init__(self, pid: int) -> None:
        self._beats = 0
        self._cpu = ProcessCpuClock(pid)
        self._heard = -1
        self._used = 0.0
        self._silent = 0.0
        self._looked = time.monotonic()

    def beat(self) -> None:
        """The child gave a sign of life."""
        self._beats += 1

    def look(self) -> float | None:
        """Seconds of silence after which the child must be taken for dead, None while it need not.

        A child whose interpreter is held up by one long call, such as loading a library, computes.
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
    """Calls tell each second from a thread of its own while `lives`; ends when there is nobody to tell."""

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
    """Whether a thread is idle or uses its core: one that waits for a lock for ever does neither.

    Made in that thread, which says when it is idle.
    """

    def __init__(self) -> None:
        self.idle = True
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._used = -1.0

    def made(self) -> bool:
        """Whether it was idle or used its core since the last call."""
        before, self._used = self._used, time.clock_gettime(self._clock)
        return self.idle or self._used - before > _LEAST_SECONDS


def drain(pipe: int) -> bool:
    """Reads what beats left in a pipe that does not block; whether there were any."""
    try:
        return bool(os.read(pipe, 4096))
    except BlockingIOError:
        return False
