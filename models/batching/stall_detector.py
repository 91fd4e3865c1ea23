"""Whether a batcher gets on, seen from outside: without its lock, which a thread that is stuck may hold."""

from __future__ import annotations

import time
from dataclasses import dataclass

from models.batching.batcher import Batcher
from models.runtime.progress import LONGEST_RUN, PATIENCE, ThreadProgress

# CPU time between two looks that is work, in seconds.
_WORK = 1e-3


@dataclass(slots=True)
class _Seen:
    """One thread's turn at the last look. age: seconds since it did anything. still: without CPU time too."""

    steps: int = -1
    cpu: float = 0.0
    age: float = 0.0
    still: float = 0.0


class StallDetector:
    """What the threads of one batcher were at, look by look. For one thread.

    quiet: seconds for which nothing was done although something is to be done.

    A run that takes longer than it may is stuck. What prepares inputs is stuck only if no thread that does so
    uses the CPU: how long a picture takes to decode nobody knows before, and others wait meanwhile. The
    network has no part in that, so the input is refused, and nothing is replaced. A thread that waits for
    another process is not stuck: its wait is bounded there. Time is that between looks, as far as they came:
    a process that was stopped, or starved, has not been stuck.
    """

    def __init__(self, batcher: Batcher) -> None:
        self.quiet = 0.0
        self._batcher = batcher
        self._seen = {turn: _Seen() for turn in batcher.turns}
        self._lost = 0.0

    def look(self, passed: float) -> str | None:
        """Why the batcher must be replaced, or None. passed: seconds since the last look that count."""
        if not self._batcher.alive:
            return "one of its threads died"
        moved, working = False, False
        for turn, seen in self._seen.items():
            moved |= turn.steps != seen.steps or turn.waits
            working |= self._update(turn, seen, passed)
        waits = self._batcher.neglected
        self._lost = 0.0 if moved or not waits else self._lost + passed
        busy = any(turn.busy for turn in self._seen)
        self.quiet = 0.0 if moved or not (busy or waits) else self.quiet + passed
        if self._lost > PATIENCE:
            return "inputs wait, and no thread takes them"
        for turn, seen in self._seen.items():
            why = self._verdict(turn, seen, passed, working)
            if why is not None and not (turn.allowed == 0 and self._batcher.refuse(turn)):
                return why
        return None

    @staticmethod
    def _update(turn: ThreadProgress, seen: _Seen, passed: float) -> bool:
        """Whether the thread is preparing inputs, and used the CPU since the last look."""
        if turn.steps != seen.steps or not turn.busy or turn.waits:
            seen.steps, seen.age, seen.still = turn.steps, 0.0, 0.0
        else:
            seen.age += passed
        if not turn.busy or turn.allowed or turn.clock is None:
            return False
        before, seen.cpu = seen.cpu, _cpu_seconds(turn.clock)
        return seen.cpu - before > _WORK

    @staticmethod
    def _verdict(turn: ThreadProgress, seen: _Seen, passed: float, working: bool) -> str | None:
        allowed = turn.allowed
        if allowed:
            return f"a run has not returned for {seen.age:.1f} s" if seen.age > allowed else None
        seen.still = 0.0 if working or not seen.age else seen.still + passed
        if seen.still > PATIENCE or seen.age > LONGEST_RUN:
            return f"a thread has not got on for {seen.age:.1f} s"
        return None


def _cpu_seconds(clock: int) -> float:
    """Of a thread; 0 once it is gone."""
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0
