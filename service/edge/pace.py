"""Delays a tenant's large requests while its recent ones cost the event loop more than the tenant's share."""

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
"""Largest body that never waits: it costs too little."""

# Time that a request costs the event loop before any computation, in milliseconds.
_MS_PER_BYTE = 4e-6
_MS_PER_ITEM = 0.05
# Time of the event loop that a tenant's refused requests may take, in milliseconds per second. Answered ones
# may take _ANSWERED times as much, and have no limit while no other tenant sends requests.
_MS_A_SECOND = 50.0
_ANSWERED = 4.0
_ALONE_SECONDS = 1.0  # without a request of another tenant, until a tenant counts as alone
# Longest wait of one body, in seconds. A request that needs longer is refused only after this wait: a client
# that is refused at once comes back at once.
_LONGEST_WAIT = 10.0
_MOST_TENANTS = 10_000  # tenants with a debt in memory


@dataclass(slots=True)
class _Debt:
    bucket: TokenBucket
    usual: float = 0.0  # cost of the last request in ms, taken as an estimate for the next one


class Pace:
    """Sets the pace at which each tenant's large requests are read. For one event loop.

    Clients that ignore Retry-After would otherwise keep the event loop busy with requests that it refuses.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Ordered from least to most recently used.
        self._debts: OrderedDict[str, _Debt] = OrderedDict()
        self._last = self._before = ("", -math.inf)

    def seen(self, tenant: str) -> None:
        """Record that the tenant has sent a request."""
        if tenant != self._last[0]:
            self._before = self._last
        self._last = (tenant, self._clock())

    async def wait(self, tenant: str) -> float:
        """Wait until the tenant's debt is paid off, and return the milliseconds reserved for this request.

        They count as spent until `settle` gives them back. If the debt takes longer than _LONGEST_WAIT to pay
        off, waits that long and raises a 429 Problem.
        """
        debt = self._debts.get(tenant)
        if debt is None or not (seconds := debt.bucket.wait(_MS_A_SECOND, self._clock())):
            return 0.0
        if seconds > _LONGEST_WAIT:
            await asyncio.sleep(_LONGEST_WAIT)
            raise Problem(
                429,
                "overloaded",
                "The large requests of this tenant take more than its share. Wait before the next one.",
                headers={"Retry-After": str(math.ceil(seconds - _LONGEST_WAIT)), "Connection": "close"},
            )
        # The reservation makes waiting requests go on one after another.
        reserved = debt.usual
        debt.bucket.take(reserved)
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            debt.bucket.take(-reserved)
            raise
        return reserved

    def settle(self, tenant: str, reserved: float, size: int, items: int, *, refused: bool) -> None:
        """Charge the tenant for a finished request. `reserved`: from `wait`. `size`: bytes of its body."""
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
