"""The threads that a run has beside the one that calls it, and the cores that they keep to."""

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
# Of the C library: the core that the calling thread is on. Linux alone has it.
_current_core = getattr(ctypes.PyDLL(None), "sched_getcpu", lambda: -1)


class IntraOpThreads:
    """Threads that are kept off the core of the one that they work for.

    A kernel may wake them on that very core while another is idle: in a virtual machine one that has been
    halted does not count as free. Then both share a core, and wait for each other at each step, until the
    kernel balances its load, milliseconds later. Empty, and without effect, where threads have no such mask.
    """

    def __init__(self, threads: Sequence[int]) -> None:
        """threads: by the numbers that the kernel knows them by."""
        self.threads = tuple(threads)
        self._cores = os.sched_getaffinity(0) if threads else set[int]()
        self._caller = -1

    def make_room(self) -> None:
        """Leaves the core that the calling thread is on to it: a system call each, if it is a new one."""
        if not self.threads or (here := _current_core()) == self._caller:
            return
        self._caller = here
        # A core that was taken from the process meanwhile, or there is but one: they stay where they may be.
        with contextlib.suppress(OSError):
            for thread in self.threads:
                os.sched_setaffinity(thread, self._cores - {here})


@contextlib.contextmanager
def capture_new_threads() -> Iterator[list[int]]:
    """The threads that this one starts meanwhile, in a list that is filled at the end.

    They are known by their name, which they inherit and keep. Empty where the kernel tells no names.
    """
    found: list[int] = []
    own = _TASKS / str(threading.get_native_id()) / "comm"
    try:
        before = own.read_text().strip()
        # Of at most 15 characters, and never the same again: others may start threads at the same time.
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
            # It may have ended by now.
            with contextlib.suppress(OSError):
                if (task / "comm").read_text().strip() == name:
                    found.append(int(task.name))
