"""CPU priorities of threads and processes: background work gives way to predictions."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor

NICENESS = 10
"""Niceness of background work, which gives way to predictions."""
HEAVY_NICENESS = 5
"""Niceness of expensive predictions: they get a quarter of a core that light predictions also want."""
DECODER_NICENESS = 15
"""Niceness of processes that decode large or suspect images: only training has a lower priority."""
# CPUCLOCK_SCHED of <linux/posix-timers.h>, which clock_getcpuclockid(3) combines with the process id.
_PROCESS_CLOCK = 2


def lower_thread_priority(niceness: int = NICENESS) -> None:
    """Nice the calling thread only; on Linux each thread has its own niceness."""
    thread = threading.get_native_id()
    # Lowering the current niceness would need a privilege.
    niceness = max(os.getpriority(os.PRIO_PROCESS, thread), niceness)
    os.setpriority(os.PRIO_PROCESS, thread, niceness)


def give_way_but_for_commits() -> Executor:
    """Nice this process and its future threads; return a one-thread executor with normal priority.

    Call it before numpy is imported, because numpy's threads keep the priority that they start with.
    """
    writer = ThreadPoolExecutor(1, "commits")
    writer.submit(threading.get_ident).result()
    os.nice(NICENESS)
    return writer


def use_idle_scheduling() -> None:
    """Run the calling thread only when its core would otherwise be idle.

    A niced thread keeps its core until the end of its time slice, so a prediction would wait for
    milliseconds. Does nothing on systems without SCHED_IDLE.
    """
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class ProcessCpuClock:
    """The CPU time of another process, over all its threads. Linux only."""

    def __init__(self, pid: int) -> None:
        self._clock = (~pid << 3) | _PROCESS_CLOCK

    def seconds(self) -> float:
        """CPU seconds so far; 0 if the process has ended or the system has no such clock."""
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return 0.0
