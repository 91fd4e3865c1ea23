"""Detection of stalled batchers from outside, without their lock, which a stuck thread may hold."""

from __future__ import annotations

import time
from dataclasses import dataclass

from models.batching.batcher import Batcher
from models.runtime.progress import LONGEST_RUN, PATIENCE, ThreadProgress

_WORK = 1e-3  # seconds of CPU time between two looks above which a thread counts as working


@dataclass(slots=True)
class _Seen:
    """The progress of one thread at the last look."""

    steps: int = -1
    cpu: float = 0.0  # seconds of CPU time
    age: float = 0.0  # seconds since its last step
    still: float = 0.0  # seconds without a step while no preparing thread used the CPU


class StallDetector:
    """Compares the progress of a batcher's threads from look to look. For use by one thread.

    `quiet`: seconds without any progress although there is work.

    A run that exceeds its allowed time is stuck. A thread that prepares an input is stuck if no preparing
    thread uses the CPU, or after LONGEST_RUN: decoding times cannot be predicted, and the threads compete for
    the cores. The network is not to blame then, so the input is refused and nothing is replaced. A thread
    that waits for another process is not stuck, because that wait has its own limit. Only the time passed to
    `look` counts, so a process that was stopped or starved is not taken for stuck.
    """

    def __init__(self, batcher: Batcher) -> None:
        self.quiet = 0.0
        self._batcher = batcher
        self._seen = {thread: _Seen() for thread in batcher.progress}
        self._lost = 0.0

    def look(self, passed: float) -> str | None:
        """Return why the batcher must be replaced, or None. `passed`: seconds to add since the last look."""
        if not self._batcher.alive:
            return "one of its threads died"
        moved, working = False, False
        for thread, seen in self._seen.items():
            moved |= thread.steps != seen.steps or thread.waits
            working |= self._update(thread, seen, passed)
        waits = self._batcher.neglected
        self._lost = 0.0 if moved or not waits else self._lost + passed
        busy = any(thread.busy for thread in self._seen)
        self.quiet = 0.0 if moved or not (busy or waits) else self.quiet + passed
        if self._lost > PATIENCE:
            return "inputs wait, and no thread takes them"
        for thread, seen in self._seen.items():
            why = self._verdict(thread, seen, passed, working)
            if why is not None and not (thread.allowed == 0 and self._batcher.refuse(thread)):
                return why
        return None

    @staticmethod
    def _update(thread: ThreadProgress, seen: _Seen, passed: float) -> bool:
        """Update `seen`; return whether the thread is preparing inputs and has used the CPU since."""
        if thread.steps != seen.steps or not thread.busy or thread.waits:
            seen.steps, seen.age, seen.still = thread.steps, 0.0, 0.0
        else:
            seen.age += passed
        if not thread.busy or thread.allowed or thread.clock is None:
            return False
        before, seen.cpu = seen.cpu, _cpu_seconds(thread.clock)
        return seen.cpu - before > _WORK

    @staticmethod
    def _verdict(thread: ThreadProgress, seen: _Seen, passed: float, working: bool) -> str | None:
        allowed = thread.allowed
        if allowed:
            return f"a run has not returned for {seen.age:.1f} s" if seen.age > allowed else None
        seen.still = 0.0 if working or not seen.age else seen.still + passed
        if seen.still > PATIENCE or seen.age > LONGEST_RUN:
            return f"a thread has not got on for {seen.age:.1f} s"
        return None


def _cpu_seconds(clock: int) -> float:
    """CPU seconds of a thread; 0 if it has ended."""
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0
