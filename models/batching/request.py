"""A caller's request to a batcher, and the errors that it may end with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import suppress

import numpy as np

from models.backbone import Embedded
from models.errors import InternalFailure, Overloaded, TimedOut, Unavailable
from models.preprocess.limits import InputError


class QueueFull(Overloaded):
    """The queue is full, or the expected wait is too long.

    `retry_after`: seconds until there should be room, estimated from the measured rate.
    """

    code = "overloaded"
    retry_after: float

    def __init__(self, retry_after: float) -> None:
        super().__init__("Too many inputs are waiting for this backbone. Try again later.")
        self.retry_after = retry_after


class DeadlineExceeded(TimedOut):
    """The deadline passed before all inputs were embedded; the remaining ones were dropped."""

    code = "deadline_exceeded"


class BatcherClosed(Unavailable):
    """The batcher is closed, not started, or one of its threads died; no input will be embedded."""

    code = "backbone_unavailable"


class EmbeddingFailed(InternalFailure):
    """The network raised an exception, kept as the cause, on the batch that held these inputs."""

    code = "embedding_failed"


class Part:
    """The inputs of a request that wait in one lane. Those before `next` have been taken."""

    __slots__ = ("costs", "next", "places", "request")

    def __init__(self, request: QueuedRequest, places: Sequence[int], costs: Sequence[float]) -> None:
        """`places`: positions of the inputs in the request. `costs`: per input, a small one's being 1."""
        self.request = request
        self.places = places
        self.costs = costs
        self.next = 0

    @property
    def source(self) -> Hashable:
        """The source of the request."""
        return self.request.source


class QueuedRequest:
    """One caller's inputs and results. All but `inputs` and `arrived` is guarded by the batcher's lock."""

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


# An input of a request: the request, and the input's position in it.
Position = tuple[QueuedRequest, int]


def settle(
    requests: Collection[QueuedRequest],
    failure: Callable[[], Exception] | None,
    report: Callable[[], None] = lambda: None,
) -> None:
    """Resolve the futures of the requests; those of callers that have gone are skipped.

    `failure`: makes each caller's exception; None for success. `report` runs after the callers have answered.
    There is one wake-up per event loop, because each wake-up writes to a socket.
    """

    def wake() -> None:
        # Callbacks run in order, so those of the callers run before `report`.
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
        # A closed event loop has no waiting callers.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(wake)
