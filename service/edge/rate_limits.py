"""Rate limits: what tenants use per second, against their quotas.

A process decides about requests by itself. In the background it tells the other processes what it has let in
for tenants that come near a quota, and is told of what they have let in.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from adapters.registry.errors import RegistryUnavailable
from adapters.registry.quotas import Quotas, Use
from adapters.threads import DATABASE
from service.errors import Problem

logger = logging.getLogger("topwork")

_SAVED_SECONDS = 2.0  # burst size, in seconds of quota
_MOST = 10_000  # tenants with a meter in memory
# Other processes are not told of use below this part of the rate, while more than half of the burst is left.
_SILENT = 0.05
# They are told of use once it is this many seconds of the rate; the second value is for less than half of the
# burst left. Larger amounts, told by many processes at once, would be refusals that the sum does not deserve.
_TOLD_AFTER, _TOLD_SOON_AFTER = 0.2, 0.1
_UNTOLD_SECONDS = 1.0  # longest time for which use above _SILENT is not told
_PAUSE = 0.1  # seconds between statements that tell of it
_PAUSE_WHILE_AWAY = 5.0  # seconds, if the database does not answer

Spend = Callable[[Sequence[Use]], Mapping[tuple[str, str], float]]
"""Tells of uses, and returns for each how many seconds of the rate all processes have used and not made up
for. Blocking; may raise RegistryUnavailable."""


class TokenBucket:
    """A token bucket that may go into debt.

    A request is admitted while any tokens are left, and then pays for everything in it; a debt delays the
    requests after it. `saved_seconds`: burst size, in seconds of the rate.
    """

    __slots__ = ("_at", "_level", "_saved_seconds", "rate")

    def __init__(self, rate: float, now: float, saved_seconds: float = _SAVED_SECONDS) -> None:
        self.rate = rate
        self._saved_seconds = saved_seconds
        self._at = now
        self._level = self._most(rate)

    def wait(self, rate: float, now: float) -> float:
        """Refill the bucket and return the seconds until it has tokens, 0 if it has. `rate`: from now on."""
        self.rate = rate
        self._level = min(self._most(rate), self._level + rate * (now - self._at))
        self._at = now
        return 0.0 if self._level > 0 else -self._level / rate + 1e-3

    def take(self, amount: float) -> None:
        """Take tokens, even if too few are left. A negative amount gives them back."""
        self._level -= amount

    def _most(self, rate: float) -> float:
        return max(1.0, self._saved_seconds * rate)


class SharedBucket(TokenBucket):
    """A token bucket from which other processes take tokens, too."""

    __slots__ = ("_since", "_untold")

    def __init__(self, rate: float, now: float) -> None:
        super().__init__(rate, now)
        self._untold = 0.0  # tokens taken since `_since` of which the others do not know
        self._since = now

    def take(self, amount: float) -> None:
        """Take tokens, even if too few are left."""
        super().take(amount)
        self._untold += amount

    def must_tell(self) -> bool:
        """Whether the others must be told of what was taken."""
        if self._level < self._most(self.rate) / 2:
            return self._untold >= self.rate * _TOLD_SOON_AFTER
        elapsed = self._at - self._since
        if self._untold <= _SILENT * self.rate * elapsed:
            self._untold, self._since = 0.0, self._at
            return False
        return self._untold >= self.rate * _TOLD_AFTER or elapsed > _UNTOLD_SECONDS

    def tell(self) -> float:
        """Return what to tell the others, in seconds of the rate."""
        # What was taken during an outage of the database has been made up for, except for a debt.
        told = min(self._untold, self._most(self.rate) - min(0.0, self._level))
        self._untold, self._since = 0.0, self._at
        return told / self.rate

    def hear(self, seconds: float, at: float, now: float) -> None:
        """Lower the level to what all have left. `seconds`: of the rate, which all had used `at` a time."""
        self.wait(self.rate, now)
        left = self._most(self.rate) - (seconds - (now - at)) * self.rate
        self._level = min(self._level, left - self._untold)


class Meter:
    """One tenant's recent usage, per quota. `tell`: called with a quota of whose use others must be told."""

    __slots__ = ("_buckets", "_tell")

    def __init__(self, tell: Callable[[str, SharedBucket], None]) -> None:
        self._buckets: dict[str, SharedBucket] = {}
        self._tell = tell

    def wait(self, quotas: Quotas, now: float) -> tuple[float, str] | None:
        """Return the seconds until the next request and the quota that demands them; None if none does."""
        limits = {
            "requests": quotas.requests_per_second,
            "items": quotas.items_per_second,
            "bytes": quotas.bytes_per_second,
        }
        longest = (0.0, "")
        for what, rate in limits.items():
            if rate is None:
                self._buckets.pop(what, None)
                continue
            bucket = self._buckets.setdefault(what, SharedBucket(rate, now))
            longest = max(longest, (bucket.wait(rate, now), what))
        return longest if longest[0] > 0 else None

    def take(self, what: str, amount: float) -> None:
        """Count requests, items or bytes; those without a quota are ignored."""
        bucket = self._buckets.get(what)
        if bucket is not None:
            bucket.take(amount)
            if bucket.must_tell():
                self._tell(what, bucket)


class RateLimiter:
    """The meters of all tenants with a quota. For one event loop.

    `spend`: None if no other process serves the tenants.
    """

    def __init__(self, spend: Spend | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._spend = spend
        self._clock = clock
        self._untold: dict[tuple[str, str], SharedBucket] = {}
        self._to_tell = asyncio.Event()
        self._meters: OrderedDict[str, Meter] = OrderedDict()

    def admit(self, tenant: str, quotas: Quotas) -> Meter | Problem | None:
        """Count a request; return the meter for its items and bytes, its refusal, or None without quotas."""
        if quotas.requests_per_second is quotas.items_per_second is quotas.bytes_per_second is None:
            self._meters.pop(tenant, None)
            return None
        meter = self._meters.get(tenant)
        if meter is None:
            meter = self._meters[tenant] = Meter(partial(self._tell, tenant))
        self._meters.move_to_end(tenant)
        while len(self._meters) > _MOST:
            self._meters.popitem(last=False)
        wait = meter.wait(quotas, self._clock())
        if wait is None:
            meter.take("requests", 1)
            return meter
        seconds, what = wait
        return Problem(
            429,
            "rate_exceeded",
            f"The tenant's quota of {what} per second is used up. Try again later.",
            headers={"Retry-After": str(math.ceil(seconds))},
        )

    async def share(self) -> None:
        """Share rates with the other processes, in a loop that runs until it is cancelled."""
        if self._spend is None:
            return
        away = False
        while True:
            await self._to_tell.wait()
            self._to_tell.clear()
            untold, self._untold = self._untold, {}
            uses = [Use(tenant, what, bucket.tell()) for (tenant, what), bucket in untold.items()]
            try:
                used, at = await DATABASE.run(self._told, self._spend, uses)
            except Exception as error:
                if not away:
                    unexpected = not isinstance(error, RegistryUnavailable)
                    logger.warning("rates are counted by this process alone: %s", error, exc_info=unexpected)
                away = True
                await asyncio.sleep(_PAUSE_WHILE_AWAY)
                continue
            away = False
            for key, seconds in used.items():
                untold[key].hear(seconds, at, self._clock())
            await asyncio.sleep(_PAUSE)

    def _told(self, spend: Spend, uses: Sequence[Use]) -> tuple[Mapping[tuple[str, str], float], float]:
        """Return what all have used, and the time before the database was asked."""
        # A busy process hears late. It must not lose what the rate has made up for since.
        at = self._clock()
        return spend(uses), at

    def _tell(self, tenant: str, what: str, bucket: SharedBucket) -> None:
        if self._spend is not None:
            self._untold[tenant, what] = bucket
            self._to_tell.set()
