"""Who waits, in turns by tenant: the one who sends most waits behind himself, not before others."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """What waits. Tenants take turns, and what one of them has comes in its order. For one event loop."""

    def __init__(self) -> None:
        # In the order of their turns.
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, tenant: str, one: T) -> None:
        """Behind what the tenant has already."""
        self._waiting.setdefault(tenant, deque()).append(one)

    def take(self) -> T:
        """What comes next; its tenant's turn comes again after all others'. Raises LookupError."""
        tenant, own = next(iter(self._waiting.items()), ("", None))
        if own is None:
            raise LookupError("Nothing waits.")
        one = own.popleft()
        self._waiting.move_to_end(tenant)
        if not own:
            del self._waiting[tenant]
        return one


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
