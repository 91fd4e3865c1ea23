"""What a thread that runs a network is at, for whoever watches it."""

from __future__ import annotations

# A run may take so many times what the measured rate says, and any run, prepared input or answer the lower
# bound: with the look that finds it late, five seconds. Beyond the upper one it hangs, whatever was measured.
PATIENCE = 4.5
LONGEST_RUN = 60.0


class ThreadProgress:
    """What one thread is at. It alone writes, and whoever watches reads, without a lock.

    steps: goes up with all that it does. busy: it has inputs. allowed: seconds that its run may take, 0 while
    it prepares inputs. waits: another process prepares its input, for a time that is bounded there. clock: of
    its CPU time, for time.clock_gettime; None until the thread has begun.
    """

    __slots__ = ("allowed", "busy", "clock", "steps", "waits")

    def __init__(self) -> None:
        self.steps = 0
        self.busy = False
        self.allowed = 0.0
        self.waits = False
        self.clock: int | None = None
