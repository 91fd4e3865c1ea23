"""The progress of a batcher's worker thread, for monitoring."""

from __future__ import annotations

import threading

from models.batching.fair_queue import FairQueue, Priority
from models.batching.request import Part, Position
from models.preprocess.limits import InputError
from models.runtime.progress import ThreadProgress


class WorkerProgress(ThreadProgress):
    """The progress of one worker thread on its lane. All but the lane is guarded by the batcher's lock.

    `thread`: the current thread. `taken`: the inputs that it has taken. `input`: the one being prepared.
    `refused`: inputs that must not be prepared, with the reason.
    """

    __slots__ = ("input", "lane", "priority", "refused", "taken", "thread")

    def __init__(self, priority: Priority[Part], lane: FairQueue[Part]) -> None:
        """`lane`: the lane of the priority that the thread works on."""
        super().__init__()
        self.priority = priority
        self.lane = lane
        self.thread: threading.Thread | None = None
        self.taken: list[tuple[Part, int]] = []
        self.input: Position | None = None
        self.refused: dict[Position, InputError] = {}

    def wait(self, waits: bool) -> None:
        """Record that the thread starts (True) or stops (False) waiting."""
        self.waits = waits
