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


@contextlib.contextmanager
def gaps(network: Any) -> Iterator[None]:
    """While it lasts, the network leaves its core for a moment after each layer, forwards and backwards.

    Linux hands a core what waits at another one when it falls idle; for one that never does, only at the next
    tick of the clock, milliseconds later. network: a torch module, all of which learns from here on.
    """

    def pause(*_: object) -> None:
        time.sleep(_GAP_SECONDS)

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
