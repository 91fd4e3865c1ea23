"""What a thread that prepares and runs inputs is at, for whoever watches it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from models.runtime.progress import ThreadProgress

if TYPE_CHECKING:
    from models.batching.request import EmbedRequest, Part
    from models.preprocess.limits import InputError


class WorkerProgress(ThreadProgress):
    """What one thread of a batcher is at.

    Guarded by the batcher's lock: thread, the one whose turn it is; taken, what it has, and input, that of it
    which is being prepared; refused, what of it is not to be prepared, and why.
    """

    __slots__ = ("input", "refused", "taken", "thread")

    def __init__(self) -> None:
        super().__init__()
        self.thread: threading.Thread | None = None
        self.taken: list[tuple[Part, int]] = []
        self.input: tuple[EmbedRequest, int] | None = None
        self.refused: dict[tuple[EmbedRequest, int], InputError] = {}

    def wait(self, waits: bool) -> None:
        """Another process begins to prepare an input, or is done."""
        self.waits = waits
