"""The progress of a thread that runs a network, for monitoring."""

from __future__ import annotations

# The time allowed for a run is derived from the measured pace, within these bounds, in seconds.
PATIENCE = 4.5  # always allowed for a run, an input or an answer; with the interval between looks, 5 s
LONGEST_RUN = 60.0  # a longer run hangs, whatever was measured


class ThreadProgress:
    """The progress of one thread. Only that thread writes it; monitors read it without a lock.

    `steps`: increases with every step done. `busy`: the thread has inputs. `allowed`: seconds that its run
    may take, 0 while it prepares inputs. `waits`: another process prepares its input, within a time limit of
    its own. `clock`: id of its CPU clock for time.clock_gettime; None until the thread has started.
    """

    __slots__ = ("allowed", "busy", "clock", "steps", "waits")

    def __init__(self) -> None:
        self.steps = 0
        self.busy = False
        self.allowed = 0.0
        self.waits = False
        self.clock: int | None = None
