"""Gaps in training, for whatever else wants its core. Torch lives here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from models.priority import ProcessCpuClock

_GAP_SECONDS = 5e-5
# From one gap to the next, at least.
_WORK_SECONDS = 5e-4
# Between looks at another process that is at work, and how long they go on.
_LOOK_SECONDS = 2e-4
_LONGEST_GAP = 0.03
# Of the time since the last gap.
_GAP_SHARE = 3.0
# Of a core's time since the last gap: more of it is work, less is housekeeping.
_BUSY = 0.1


@contextlib.contextmanager
def cooperative_pauses(network: Any, first: int | None = None) -> Iterator[None]:
    """While it lasts, training leaves its core for a moment every few layers, and between optimizers.

    Linux hands a core what waits at another one when it falls idle; for one that never does, only at the next
    tick of the clock, milliseconds later. At a tick, a thread that is behind all others may also be given a
    core of theirs, and has it to the next gap or tick.

    network: a torch module. first: a process that goes first: while it is at work, a gap lasts until it
    rests, or three times as long as what was done since the last one, for with a core for each the two would
    still share cache and memory.
    """
    other = None if first is None else ProcessCpuClock(first)
    since, used = time.perf_counter(), 0.0 if other is None else other.seconds()

    def pause(*_: object) -> None:
        nonlocal since, used
        if time.perf_counter() < since + _WORK_SECONDS:
            return
        time.sleep(_GAP_SECONDS)
        now = time.perf_counter()
        if other is not None:
            seconds = other.seconds()
            end = now + min(_GAP_SHARE * (now - since), _LONGEST_GAP)
            busy = seconds - used > _BUSY * (now - since)
            while busy and time.perf_counter() < end:
                time.sleep(_LOOK_SECONDS)
                before, seconds = seconds, other.seconds()
                busy = seconds > before
            used = seconds
        since = time.perf_counter()

    def after(_: object, __: object, output: Any) -> None:
        pause()
        if getattr(output, "requires_grad", False):
            # On the way back, before the layer itself.
            output.register_hook(pause)

    layers = [module for module in network.modules() if not any(module.children())]
    hooks = [layer.register_forward_hook(after) for layer in layers]
    hooks.append(register_optimizer_step_post_hook(pause))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
