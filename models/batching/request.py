"""A caller's inputs on their way through a batcher, and what may become of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import suppress

import numpy as np

from models.backbone import Embedded
from models.preprocess.preprocessor import InputError


class Overloaded(RuntimeError):
    """The queue is full, or the wait too long.

    retry_after: seconds after which there should be room, from the rate measured.
    """

    code = "overloaded"

    def __init__(self, retry_after: float) -> None:
        super().__init__("Too many inputs are waiting for this backbone; try again later.")
        self.retry_after = retry_after


class DeadlineExceeded(RuntimeError):
    """The deadline passed before all inputs were embedded; what was left of them was dropped."""

    code = "deadline_exceeded"


class BatcherClosed(RuntimeError):
    """The batcher is closed, not started, or one of its threads died; no input will be embedded."""

    code = "backbone_unavailable"


class EmbeddingFailed(RuntimeError):
    """The network raised on the batch that held these inputs; its own exception is the cause."""

    code = "embedding_failed"


class Part:
    """Those inputs of a request that wait in one lane. next: those before it are taken."""

    __slots__ = ("costs", "next", "places", "request")

    def __init__(self, request: EmbedRequest, places: Sequence[int], costs: Sequence[float]) -> None:
        """places: of the inputs in the request. costs: of each, in units of a small input's."""
        self.request = request
        self.places = places
        self.costs = costs
        self.next = 0

    @property
    def source(self) -> Hashable:
        """From whom they come."""
        return self.request.source


class EmbedRequest:
    """One caller's inputs. Everything but inputs and arrived is guarded by the batcher's lock."""

    __slots__ = (
        "arrived",
        "begun",
        "bulk",
        "counted",
        "embeddings",
        "errors",
        "future",
        "inputs",
        "parts",
        "pending",
        "source",
        "timings",
        "tokens",
        "truncated",
        "unknown",
    )

    def __init__(
        self,
        inputs: Sequence[bytes | str],
        dim: int,
        stage: str,
        source: Hashable,
        counted: bool,
        bulk: bool,
    ) -> None:
        self.inputs = inputs
        self.bulk = bulk
        self.parts: list[Part] = []
        self.begun = False
        self.source = source
        self.counted = counted
        self.future: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()
        self.arrived = time.perf_counter()
        self.embeddings = np.zeros((len(inputs), dim), np.float32)
        self.errors: dict[int, InputError] = {}
        self.unknown: set[int] = set()
        self.truncated: set[int] = set()
        self.tokens = 0
        self.timings = {stage: 0.0, "queue": 0.0, "embed": 0.0}
        self.pending = len(inputs)


def settle(
    requests: Collection[EmbedRequest],
    failure: Callable[[], Exception] | None,
    report: Callable[[], None] = lambda: None,
) -> None:
    """Wakes the callers, of whom some may have gone: all at once, for each waking writes to a socket. What is
    to be reported has time until they have answered.
    """

    def wake() -> None:
        # Callbacks run in their order: those of the callers before this one.
        for request in requests:
            if request.future.done():
                continue
            if failure is None:
                embedded = Embedded(
                    request.embeddings,
                    request.errors,
                    request.timings,
                    len(requests),
                    frozenset(request.unknown),
                    frozenset(request.truncated),
                    request.tokens,
                )
                request.future.set_result(embedded)
            else:
                request.future.set_exception(failure())
        asyncio.get_running_loop().call_soon(report)

    for loop in {request.future.get_loop() for request in requests}:
        # A loop that is closed has nobody who waits.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(wake)
