"""Has a tenant wait with large requests while its last ones cost others too much, refused ones above all."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.edge.rate_limits import TokenBucket
from service.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL_BYTES = 16 << 10
"""A body of no more costs too little to be waited for."""

# Milliseconds of the event loop that a request takes before anything is computed.
_MS_PER_BYTE = 4e-6
_MS_PER_ITEM = 0.05
# A tenant's refused requests may take so many milliseconds of each second. Answered ones may take so many
# times as long, and have no limit while nobody else asks.
_MS_A_SECOND = 50.0
_ANSWERED = 4.0
_ALONE_SECONDS = 1.0
# For the body of one request. Who would wait for longer is told to come again after that: told at once, he
# would be back at once.
_LONGEST_WAIT = 10.0
_MOST_TENANTS = 10_000


@dataclass(slots=True)
class _Debt:
    bucket: TokenBucket
    # The last request took so long. The next one is expected to take as long.
    usual: float = 0.0


class Pace:
    """At what pace each tenant's large requests are let in. For one event loop.

    Who asks again and again, whatever Retry-After says, would else keep the loop busy with what it refuses.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Least recently used first.
        self._debts: OrderedDict[str, _Debt] = OrderedDict()
        self._last = self._before = ("", -math.inf)

    def seen(self, tenant: str) -> None:
        """Notes that the tenant has sent a request."""
        if tenant != self._last[0]:
            self._before = self._last
        self._last = (tenant, self._clock())

    async def wait(self, tenant: str) -> float:
        """Until what the tenant's requests have cost by now is made up for.

        What is returned counts as spent from now on, and is given back by `settle`. Raises a 429 Problem
        once that has taken long.
        """
        debt = self._debts.get(tenant)
        if debt is None or not (seconds := debt.bucket.wait(_MS_A_SECOND, self._clock())):
            return 0.0
        if seconds > _LONGEST_WAIT:
            await asyncio.sleep(_LONGEST_WAIT)
            raise Problem(
                429,
                "overloaded",
                "The large requests of this tenant take more than its share; wait before the next one.",
                headers={"Retry-After": str(math.ceil(seconds - _LONGEST_WAIT)), "Connection": "close"},
            )
        # Those that wait go on one after the other.
        reserved = debt.usual
        debt.bucket.take(reserved)
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            debt.bucket.take(-reserved)
            raise
        return reserved

    def settle(self, tenant: str, reserved: float, size: int, items: int, *, refused: bool) -> None:
        """Notes how a request ended that was waited for. size: bytes that were read of it."""
        debt = self._debts.get(tenant)
        if debt is not None:
            debt.bucket.take(-reserved)
        if not refused and self._is_alone(tenant):
            return
        if debt is None:
            debt = self._debts[tenant] = _Debt(TokenBucket(_MS_A_SECOND, self._clock()))
            if len(self._debts) > _MOST_TENANTS:
                self._debts.popitem(last=False)
        self._debts.move_to_end(tenant)
        debt.bucket.wait(_MS_A_SECOND, self._clock())
        debt.usual = (_MS_PER_BYTE * size + _MS_PER_ITEM * items) / (1.0 if refused else _ANSWERED)
        debt.bucket.take(debt.usual)

    def _is_alone(self, tenant: str) -> bool:
        other = self._before if self._last[0] == tenant else self._last
        return self._clock() - other[1] > _ALONE_SECONDS
