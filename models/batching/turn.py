"""What a thread that prepares or runs inputs is at, for whoever watches it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.batching.request import EmbedRequest, Part
    from models.preprocess.preprocessor import InputError

# A run may take so many times what the measured rate says, and any run, prepared input or answer the lower
# bound: with the look that finds it late, five seconds. Beyond the upper one it hangs, whatever was measured.
PATIENCE = 4.5
LONGEST_RUN = 60.0


class WorkerProgress:
    """What one thread of a batcher is at. It alone writes, and whoever watches reads, without a lock.

    steps: goes up with all that it does. busy: it has inputs. allowed: seconds that its run may take, 0 while
    it prepares inputs. waits: another process prepares its input, for a time that is bounded there. clock: of
    its CPU time, for time.clock_gettime; None until the thread has begun.

    Guarded by the batcher's lock: thread, the one whose turn it is; taken, what it has, and input, that of it
    which is being prepared; refused, what of it is not to be prepared, and why.
    """

    __slots__ = (
        "allowed",
        "busy",
        "clock",
        "input",
        "refused",
        "steps",
        "taken",
        "thread",
        "waits",
    )

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.taken: list[tuple[Part, int]] = []
        self.input: tuple[EmbedRequest, int] | None = None
        self.refused: dict[tuple[EmbedRequest, int], InputError] = {}
        self.waits = False
        self.steps = 0
        self.busy = False
        self.allowed = 0.0
        self.clock: int | None = None

    def wait(self, waits: bool) -> None:
        """Another process begins to prepare an input, or is done."""
        self.waits = waits
