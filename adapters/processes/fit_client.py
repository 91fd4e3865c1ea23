"""Fits heads in niced child processes, so that training never starves serving."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

from adapters.probe.fit import Dataset, FittedProbe, ProbeConfig, expected_seconds
from adapters.processes.errors import FitterOverloaded
from adapters.processes.fit_queue import FitQueue
from models.priority import NICENESS

# The time of a fit on more examples than this is predicted in a thread: even counting the labels is slow.
_MANY_EXAMPLES: Final = 5_000


class Fitter:
    """Bounded queues in front of fitting processes, in which tenants take turns. Use from one event loop.

    Fits queue by their predicted time, so that long ones never delay short ones. The first queue's process
    keeps running. The process of any other queue starts with its first fit, at a lower priority, and ends
    after `idle_seconds` without one.
    """

    def __init__(
        self, max_queue: int = 16, bounds: Sequence[float] = (math.inf,), idle_seconds: float = 600.0
    ) -> None:
        """Create a fitter.

        `max_queue`: most fits of a tenant that is alone. `bounds`: longest predicted time of the fits of each
        queue, in seconds; the last one is infinite.
        """
        self._max_queue = max_queue
        self._bounds = tuple(bounds)
        self._queues = [
            FitQueue(NICENESS + 2 * place, None if place == 0 else idle_seconds)
            for place in range(len(bounds))
        ]

    @property
    def alive(self) -> bool:
        """Whether fits are accepted: every queue is open, and the first one's process could be started."""
        return not self._queues[0].broken and all(queue.open for queue in self._queues)

    @property
    def queued(self) -> int:
        """Number of fits that wait or run."""
        return self._tenants().total()

    @property
    def replaced(self) -> int:
        """Number of processes that replaced one that died or was killed because it was silent."""
        return sum(queue.replaced for queue in self._queues)

    async def start(self) -> None:
        """Start the first process and wait until it is ready. Raises FitterUnavailable."""
        await self._queues[0].running()
        for queue in self._queues:
            queue.start()

    async def fit(
        self, dataset: Dataset, config: ProbeConfig = ProbeConfig(), *, tenant: str = ""
    ) -> FittedProbe:
        """Run adapters.probe.fit.fit in a child process.

        A cancelled call leaves the queue, but a running fit is not interrupted. Raises what fit raises,
        FitFailed, FitterOverloaded, FitterUnavailable.
        """
        if len(dataset.targets) > _MANY_EXAMPLES:
            seconds = await asyncio.to_thread(expected_seconds, dataset, config)
        else:
            seconds = expected_seconds(dataset, config)
        queue = next(
            queue for queue, bound in zip(self._queues, self._bounds, strict=True) if seconds <= bound
        )
        if not self._has_share(tenant):
            raise FitterOverloaded(max(1.0, queue.usual_seconds * queue.queued))
        return await queue.fit(tenant, dataset, config)

    async def close(self) -> None:
        """Stop the processes. Fits that wait or run raise FitterUnavailable."""
        await asyncio.gather(*(queue.close() for queue in self._queues))

    def _tenants(self) -> Counter[str]:
        """Return the number of fits that wait or run, by tenant."""
        return sum((queue.tenants() for queue in self._queues), Counter[str]())

    def _has_share(self, tenant: str) -> bool:
        """Return whether one more fit of the tenant is within its share of the queue, or is its first."""
        found = self._tenants()
        own, tenants = found[tenant], len(found.keys() | {tenant})
        if own == 0:
            return tenants <= self._max_queue
        return own < self._max_queue / tenants and found.total() < 2 * self._max_queue
