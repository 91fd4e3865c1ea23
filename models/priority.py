"""Lets what can wait have the cores that nothing else wants."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor

NICENESS = 10
"""Of whatever gives way to predictions."""
HEAVY_NICENESS = 5
"""Of predictions that would hold up light ones: they get a quarter of a core that light ones want too."""
DECODER_NICENESS = 15
"""Of the processes that decode large and doubtful pictures: all else comes first, training excepted."""
# CPUCLOCK_SCHED of <linux/posix-timers.h>: what clock_getcpuclockid(3) puts beside a process's number.
_PROCESS_CLOCK = 2


def lower_thread_priority(niceness: int = NICENESS) -> None:
    """Nices this thread alone: Linux nices threads, not only processes."""
    thread = threading.get_native_id()
    # Less than it has by now would need a privilege.
    niceness = max(os.getpriority(os.PRIO_PROCESS, thread), niceness)
    os.setpriority(os.PRIO_PROCESS, thread, niceness)


def give_way_but_for_commits() -> Executor:
    """Nices this process, all threads that begin from now on, and not the one that is returned.

    To be called before numpy is imported, whose threads keep the priority that they begin with.
    """
    writer = ThreadPoolExecutor(1, "commits")
    writer.submit(threading.get_ident).result()
    os.nice(NICENESS)
    return writer


def use_idle_scheduling() -> None:
    """Takes this thread behind everything else that wants its core.

    A niced thread keeps a core for the rest of its slice, milliseconds that a prediction would wait for.
    Where the system knows no such policy, the thread stays as it is.
    """
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class ProcessCpuClock:
    """The CPU time of another process, of all its threads. Linux alone has such clocks."""

    def __init__(self, pid: int) -> None:
        self._clock = (~pid << 3) | _PROCESS_CLOCK

    def seconds(self) -> float:
        """So far; 0 once the process is gone, or where there is no such clock."""
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return 0.0
