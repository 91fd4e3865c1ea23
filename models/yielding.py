"""Lets what can wait have the cores that nothing else wants."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

NICENESS = 10
"""Of whatever gives way to predictions."""
_GAP_SECONDS = 5e-5
# Between looks at another process that is at work, and how long they go on.
_LOOK_SECONDS = 2e-4
_LONGEST_GAP = 0.02
# Of the time since the last gap.
_GAP_SHARE = 2.0
# Of a core's time since the last gap: more of it is work, less is housekeeping.
_BUSY = 0.1
# CPUCLOCK_SCHED of <linux/posix-timers.h>: what clock_getcpuclockid(3) puts beside a process's number.
_PROCESS_CLOCK = 2


def give_way() -> None:
    """Nices this thread alone: Linux nices threads, not only processes."""
    thread = threading.get_native_id()
    # Less than it has by now would need a privilege.
    niceness = max(os.getpriority(os.PRIO_PROCESS, thread), NICENESS)
    os.setpriority(os.PRIO_PROCESS, thread, niceness)


def step_aside() -> None:
    """Takes this thread behind everything else that wants its core.

    A niced thread keeps a core for the rest of its slice, milliseconds that a prediction would wait for.
    Where the system knows no such policy, the thread stays as it is.
    """
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Other:
    """The CPU time of another process, of all its threads. Linux alone has such clocks."""

    def __init__(self, pid: int) -> None:
        self._clock = (~pid << 3) | _PROCESS_CLOCK

    def seconds(self) -> float:
        """So far; 0 once the process is gone, or where there is no such clock."""
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return 0.0


@contextlib.contextmanager
def gaps(network: Any, first: int | None = None) -> Iterator[None]:
    """While it lasts, the network leaves its core for a moment after each layer, forwards and backwards.

    Linux hands a core what waits at another one when it falls idle; for one that never does, only at the next
    tick of the clock, milliseconds later. network: a torch module, all of which learns from here on. first: a
    process that goes first: while it is at work, a gap lasts until it rests, or twice as long as the layer
    took, for with a core for each the two would still share cache and memory.
    """
    other = None if first is None else Other(first)
    since, used = time.perf_counter(), 0.0 if other is None else other.seconds()

    def pause(*_: object) -> None:
        nonlocal since, used
        time.sleep(_GAP_SECONDS)
        if other is None:
            return
        now, seconds = time.perf_counter(), other.seconds()
        end = now + min(_GAP_SHARE * (now - since), _LONGEST_GAP)
        busy = seconds - used > _BUSY * (now - since)
        while busy and time.perf_counter() < end:
            time.sleep(_LOOK_SECONDS)
            before, seconds = seconds, other.seconds()
            busy = seconds > before
        since, used = time.perf_counter(), seconds

    network.requires_grad_(True)
    hooks = []
    for module in network.modules():
        matrices = [own for own in module.parameters(recurse=False) if own.ndim > 1]
        hooks += [own.register_post_accumulate_grad_hook(pause) for own in matrices]
        if matrices:
            hooks.append(module.register_forward_hook(pause))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
