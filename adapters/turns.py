"""Waiting lines in which tenants take turns, so that a busy tenant delays only itself."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class TenantTurns(Generic[T]):
    """A queue in which tenants take turns; the items of one tenant keep their order. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        # Number of each tenant's last turn. An empty queue forgets all but the latest.
        self._served: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, tenant: str, one: T) -> None:
        """Append an item to the tenant's line."""
        self._waiting.setdefault(tenant, deque()).append(one)

    def take(self, may: Callable[[str], bool] = lambda tenant: True) -> T:
        """Remove and return the next item of the tenant whose last turn is the longest ago.

        `may`: whether a tenant may have a turn now. Raises LookupError if none may.
        """
        tenants = [tenant for tenant in self._waiting if may(tenant)]
        if not tenants:
            raise LookupError("Nothing waits.")
        tenant = min(tenants, key=lambda one: self._served.get(one, 0))
        own = self._waiting[tenant]
        one = own.popleft()
        if not own:
            del self._waiting[tenant]
        last = max(self._served.values(), default=0) + 1
        self._served = {**self._served, tenant: last} if self._waiting else {tenant: last}
        return one

    def remove(self, tenant: str, one: T) -> None:
        """Remove an item, if it is still waiting."""
        own = self._waiting.get(tenant, deque())
        with suppress(ValueError):
            own.remove(one)
            if not own:
                del self._waiting[tenant]

    def counts(self) -> Counter[str]:
        """Return the number of waiting items by tenant."""
        return Counter({tenant: len(own) for tenant, own in self._waiting.items()})


class Gate:
    """A semaphore of `most` places for which tenants take turns. For one event loop."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: TenantTurns[asyncio.Future[None]] = TenantTurns()

    @asynccontextmanager
    async def passed(self, tenant: str) -> AsyncIterator[None]:
        """Wait for the tenant's turn, and hold a place inside the block."""
        if self._free:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(tenant, turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while len(self._waiting):
            turn = self._waiting.take()
            # A waiter that was cancelled meanwhile is skipped.
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
