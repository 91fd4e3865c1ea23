"""State that batchers on the same CPU cores share."""

from __future__ import annotations

import threading

from models.batching.fair_queue import Priority
from models.batching.request import Part


class CoreSharing:
    """The predict queues of batchers on the same cores: each can see whether another runs. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The tuple is replaced, never mutated, because it is read without the lock.
        self._all: tuple[Priority[Part], ...] = ()

    def join(self, predicts: Priority[Part]) -> None:
        """Make the runs of these predicts visible to the others."""
        with self._lock:
            self._all = (*self._all, predicts)

    def leave(self, predicts: Priority[Part]) -> None:
        """Hide these predicts from the others, even if some still run. Idempotent."""
        with self._lock:
            self._all = tuple(one for one in self._all if one is not predicts)

    def others_run(self, predicts: Priority[Part]) -> bool:
        """Whether the predicts of another batcher are running now."""
        return any(one.running for one in self._all if one is not predicts)
