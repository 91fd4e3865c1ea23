"""The progress of a batcher's worker thread, for monitoring."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from models.runtime.progress import ThreadProgress

if TYPE_CHECKING:
    from models.batching.request import Part, QueuedRequest
    from models.preprocess.limits import InputError


class WorkerProgress(ThreadProgress):
    """The progress of one worker thread. These attributes are guarded by the batcher's lock.

    `thread`: the current thread. `taken`: the inputs that it has taken. `input`: the one being prepared.
    `refused`: inputs that must not be prepared, with the reason.
    """

    __slots__ = ("input", "refused", "taken", "thread")

    def __init__(self) -> None:
        super().__init__()
        self.thread: threading.Thread | None = None
        self.taken: list[tuple[Part, int]] = []
        self.input: tuple[QueuedRequest, int] | None = None
        self.refused: dict[tuple[QueuedRequest, int], InputError] = {}

    def wait(self, waits: bool) -> None:
        """Record that the thread starts (True) or stops (False) waiting."""
        self.waits = waits
