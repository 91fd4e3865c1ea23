"""What batchers that share a machine's cores know of each other."""

from __future__ import annotations

import threading

from models.lane import Lane
from models.request import Request


class Cores:
    """Predicts of several batchers on the same cores: each sees whether those of another run. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Never changed, but replaced: it is read without the lock.
        self._lanes: tuple[Lane[Request], ...] = ()

    def join(self, lane: Lane[Request]) -> None:
        """Its runs are seen by the others from now on."""
        with self._lock:
            self._lanes = (*self._lanes, lane)

    def leave(self, lane: Lane[Request]) -> None:
        """It is not looked at any more, whatever it still runs; as often as one likes."""
        with self._lock:
            self._lanes = tuple(one for one in self._lanes if one is not lane)

    def others_run(self, lane: Lane[Request]) -> bool:
        """Whether another one's predicts run at this moment."""
        return any(one.running for one in self._lanes if one is not lane)
