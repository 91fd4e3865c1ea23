"""Who waits, in turns by tenant: the one who sends most waits behind himself, not before others."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """What waits. Tenants take turns, and what one of them has comes in its order. For one thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        # When each had its last turn, of those who had one since nothing waited.
        self._served: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, tenant: str, one: T) -> None:
        """Behind what the tenant has already."""
        self._waiting.setdefault(tenant, deque()).append(one)

    def take(self, may: Callable[[str], bool] = lambda tenant: True) -> T:
        """What comes next: of the tenant whose last turn is the longest ago, among those who may have one.

        Raises LookupError.
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
        """It waits no longer, if it did."""
        own = self._waiting.get(tenant, deque())
        with suppress(ValueError):
            own.remove(one)
            if not own:
                del self._waiting[tenant]

    def counts(self) -> Counter[str]:
        """How many each tenant has."""
        return Counter({tenant: len(own) for tenant, own in self._waiting.items()})


class Gate:
    """Lets a few through at once; the others wait in turns by tenant. For one event loop."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: Turns[asyncio.Future[None]] = Turns()

    @asynccontextmanager
    async def passed(self, tenant: str) -> AsyncIterator[None]:
        """Holds a place meanwhile, as soon as it is the tenant's turn."""
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
            # Some have left meanwhile.
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
