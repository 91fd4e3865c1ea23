"""CPU affinity of the threads that help the calling thread with a run."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

_TASKS = Path("/proc/self/task")
_numbers = itertools.count(1)
# The C library's function for the calling thread's core. Linux only.
_current_core = getattr(ctypes.PyDLL(None), "sched_getcpu", lambda: -1)


class IntraOpThreads:
    """The helper threads of runs, which are kept off the calling thread's core.

    A kernel may wake them on that core while another is idle: in a virtual machine, a halted core does not
    count as free. Both threads then share a core and wait for each other at each step, until the kernel
    balances its load milliseconds later. Without threads, as on systems without affinity masks, it does
    nothing.
    """

    def __init__(self, threads: Sequence[int]) -> None:
        """`threads`: the kernel's thread ids."""
        self.threads = tuple(threads)
        self._cores = os.sched_getaffinity(0) if threads else set[int]()
        self._caller = -1

    def make_room(self) -> None:
        """Reserve the calling thread's core for it: one system call per helper if the core has changed."""
        if not self.threads or (here := _current_core()) == self._caller:
            return
        self._caller = here
        # This fails if the process has lost a core or has only one; the threads then keep their masks.
        with contextlib.suppress(OSError):
            for thread in self.threads:
                os.sched_setaffinity(thread, self._cores - {here})


@contextlib.contextmanager
def capture_new_threads() -> Iterator[list[int]]:
    """Yield a list that is filled on exit with the ids of the threads started by this one in between.

    They are identified by their name, which they inherit and keep. The list stays empty if the kernel does
    not tell the names of threads.
    """
    found: list[int] = []
    own = _TASKS / str(threading.get_native_id()) / "comm"
    try:
        before = own.read_text().strip()
        # The name has at most 15 characters and is unique, as other threads may start some at the same time.
        name = f"run-{next(_numbers)}"
        own.write_text(name)
    except OSError:
        yield found
        return
    try:
        yield found
    finally:
        own.write_text(before)
        for task in _TASKS.iterdir():
            # The thread may have ended by now.
            with contextlib.suppress(OSError):
                if (task / "comm").read_text().strip() == name:
                    found.append(int(task.name))
