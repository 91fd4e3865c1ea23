"""What tenants use by the second, beside what they may."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from adapters.registry.tenants import Quotas
from service.errors import Problem

_SAVED_SECONDS = 2.0
_MOST = 10_000


class TokenBucket:
    """Fills at a rate. What is taken may leave a debt: then nothing is given for a while. So a request is let
    in while there is anything left, and pays for all that turned out to be in it.

    saved_seconds: what is not used is saved up for so long.
    """

    __slots__ = ("_at", "_level", "_saved_seconds", "rate")

    def __init__(self, rate: float, now: float, saved_seconds: float = _SAVED_SECONDS) -> None:
        self.rate = rate
        self._saved_seconds = saved_seconds
        self._at = now
        self._level = self._most(rate)

    def wait(self, rate: float, now: float) -> float:
        """Seconds until there is something again, at this rate from now on; 0 where there is."""
        self.rate = rate
        self._level = min(self._most(rate), self._level + rate * (now - self._at))
        self._at = now
        return 0.0 if self._level > 0 else -self._level / rate + 1e-3

    def take(self, amount: float) -> None:
        """Takes so much, there or not."""
        self._level -= amount

    def _most(self, rate: float) -> float:
        return max(1.0, self._saved_seconds * rate)


class Meter:
    """What one tenant has used of late."""

    __slots__ = ("_buckets",)

    def __init__(self) -> None:
        self._buckets: dict[str, TokenBucket] = {}

    def wait(self, quotas: Quotas, now: float) -> tuple[float, str] | None:
        """Seconds until another request may come, and which quota says so; None where one may come now."""
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
            bucket = self._buckets.setdefault(what, TokenBucket(rate, now))
            longest = max(longest, (bucket.wait(rate, now), what))
        return longest if longest[0] > 0 else None

    def take(self, what: str, amount: float) -> None:
        """Counts requests, items or bytes; those without a quota are not counted."""
        bucket = self._buckets.get(what)
        if bucket is not None:
            bucket.take(amount)


class RateLimiter:
    """The meters of all tenants with a quota. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._meters: OrderedDict[str, Meter] = OrderedDict()

    def admit(self, tenant: str, quotas: Quotas) -> Meter | Problem | None:
        """The meter of what else a request uses, which counts as one; or its refusal; None without quotas."""
        if quotas.requests_per_second is quotas.items_per_second is quotas.bytes_per_second is None:
            self._meters.pop(tenant, None)
            return None
        meter = self._meters.setdefault(tenant, Meter())
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
            f"The tenant's quota of {what} a second is used up; try again later.",
            headers={"Retry-After": str(math.ceil(seconds))},
        )
