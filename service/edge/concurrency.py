"""Limits on what may be open at once, in all and per tenant."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from service.errors import Problem

# Open bulk uploads; each holds one part (see adapters/jobs/submission.py) in memory, however slow it is.
UPLOADS = 48
UPLOADS_OF_A_TENANT = 2


class ConcurrencyLimit:
    """Limits what may be open at once, in all and per tenant. For one event loop.

    Once half of all slots are taken, a tenant that has one gets no more.
    """

    def __init__(self, what: str, most: int, most_of_a_tenant: int) -> None:
        self._what = what
        self._most = most
        self._most_of_a_tenant = most_of_a_tenant
        self._open: Counter[str] = Counter()
        self._freed = asyncio.Event()

    @contextmanager
    def take(self, tenant: str) -> Iterator[None]:
        """Hold a slot for the block. Raises a 429 Problem if none is free."""
        if not self._has_room(tenant):
            raise Problem(
                429,
                f"too_many_{self._what}",
                f"{self._most_of_a_tenant} {self._what} of a tenant may be open at once, and {self._most} "
                "of all; wait for one to end.",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            self._open = +self._open
            self._freed.set()

    @asynccontextmanager
    async def wait(self, tenant: str, seconds: float) -> AsyncIterator[None]:
        """Wait up to `seconds` for a slot and hold it for the block. Raises a 429 Problem if none is free."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._has_room(tenant):
                    self._freed.clear()
                    await self._freed.wait()
        with self.take(tenant):
            yield

    def _has_room(self, tenant: str) -> bool:
        own, of_all = self._open[tenant], self._open.total()
        share = self._most if own == 0 else self._most / 2
        return own < self._most_of_a_tenant and of_all < share
