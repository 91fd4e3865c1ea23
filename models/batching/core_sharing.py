"""What batchers that share a machine's cores know of each other."""

from __future__ import annotations

import threading

from models.batching.fair_queue import Priority
from models.batching.request import Part


class CoreSharing:
    """Predicts of several batchers on the same cores: each sees whether those of another run. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Never changed, but replaced: it is read without the lock.
        self._all: tuple[Priority[Part], ...] = ()

    def join(self, predicts: Priority[Part]) -> None:
        """Its runs are seen by the others from now on."""
        with self._lock:
            self._all = (*self._all, predicts)

    def leave(self, predicts: Priority[Part]) -> None:
        """It is not looked at any more, whatever it still runs; as often as one likes."""
        with self._lock:
            self._all = tuple(one for one in self._all if one is not predicts)

    def others_run(self, predicts: Priority[Part]) -> bool:
        """Whether another one's predicts run at this moment."""
        return any(one.running for one in self._all if one is not predicts)
