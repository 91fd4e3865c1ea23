"""The CPU usage of other processes, which tells whether a measurement is reliable."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
# Fields of a line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal. Guests are in user.
_FIELDS, _IDLE = 8, (3, 4)


class Usage:
    """The use of this process's cores by others since creation, other guests of the hypervisor included."""

    def __init__(self) -> None:
        self._begun = self._read()

    def others(self) -> float:
        """The share of the cores' time used by others so far; 0 if the kernel does not tell."""
        busy, whole, own = (now - then for now, then in zip(self._read(), self._begun, strict=True))
        return min(1.0, max(0.0, busy - own) / whole) if whole > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds of CPU time: busy and total of the cores, and of this process."""
        own = time.process_time()
        busy = whole = 0
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        try:
            lines = _STAT.read_text().splitlines()
        except OSError:
            return 0.0, 0.0, own
        for name, *ticks in map(str.split, lines):
            if name in cores:
                counts = [int(count) for count in ticks[:_FIELDS]]
                whole += sum(counts)
                busy += sum(count for field, count in enumerate(counts) if field not in _IDLE)
        tick = os.sysconf("SC_CLK_TCK")
        return busy / tick, whole / tick, own
