"""Pauses in training that leave the core to other work. Requires torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from models.priority import ProcessCpuClock

_GAP_SECONDS = 5e-5  # length of a pause
_WORK_SECONDS = 5e-4  # shortest time from one pause to the next
_LOOK_SECONDS = 2e-4  # interval between checks of the other process while it is busy
_LONGEST_GAP = 0.03  # seconds; longest wait for the other process
_GAP_SHARE = 3.0  # longest wait, as a multiple of the time since the last pause
_BUSY = 0.1  # share of a core since the last pause; more is work, less is housekeeping


@contextlib.contextmanager
def cooperative_pauses(network: Any, first: int | None = None) -> Iterator[None]:
    """Make training leave its core for a moment every few layers, and between optimizers.

    Linux moves a waiting thread to another core when that core falls idle; to a core that never does, only at
    the next timer tick, milliseconds later. At a tick, even a thread of the lowest priority may be given a
    core that others use, and keeps it until the next pause or tick.

    `network`: a torch module. `first`: id of a process with priority. While it is busy, a pause lasts until
    it rests, or up to three times as long as the work since the last pause: even with a core each, the two
    would share cache and memory.
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
            # The backward pass runs this hook just before the layer's own part.
            output.register_hook(pause)

    layers = [module for module in network.modules() if not any(module.children())]
    hooks = [layer.register_forward_hook(after) for layer in layers]
    hooks.append(register_optimizer_step_post_hook(pause))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
