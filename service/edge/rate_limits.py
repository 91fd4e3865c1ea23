"""Rate limits: what tenants use per second, against their quotas."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from adapters.registry.quotas import Quotas
from service.errors import Problem

_SAVED_SECONDS = 2.0  # burst size, in seconds of quota
_MOST = 10_000  # tenants with a meter in memory


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


class Meter:
    """One tenant's recent usage, per quota."""

    __slots__ = ("_buckets",)

    def __init__(self) -> None:
        self._buckets: dict[str, TokenBucket] = {}

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
            bucket = self._buckets.setdefault(what, TokenBucket(rate, now))
            longest = max(longest, (bucket.wait(rate, now), what))
        return longest if longest[0] > 0 else None

    def take(self, what: str, amount: float) -> None:
        """Count requests, items or bytes; those without a quota are ignored."""
        bucket = self._buckets.get(what)
        if bucket is not None:
            bucket.take(amount)


class RateLimiter:
    """The meters of all tenants with a quota. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._meters: OrderedDict[str, Meter] = OrderedDict()

    def admit(self, tenant: str, quotas: Quotas) -> Meter | Problem | None:
        """Count a request; return the meter for its items and bytes, its refusal, or None without quotas."""
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
            f"The tenant's quota of {what} per second is used up. Try again later.",
            headers={"Retry-After": str(math.ceil(seconds))},
        )
