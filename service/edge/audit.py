"""The audit log: one line for each request that changes data or tries to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from service.edge.access_log import logged
from service.edge.rate_limits import TokenBucket

_logger = logging.getLogger("topwork.audit")

# Lines about refused requests are rate-limited, so that a flood of them cannot fill the disk. Each key has
# its own limit; all requests without a known key share one.
REFUSALS_AT_ONCE = 100  # burst, in lines
_REFUSALS_PER_SECOND = 1.0
_TOLD_AFTER = 60.0  # seconds from the first omitted line to the line that counts the omitted ones
_MOST_KEYS = 10_000  # keys with a limit in memory; the least recently used goes first


class Audit:
    """Writes the audit log. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._left_out: Counter[str] = Counter()
        self._due: asyncio.TimerHandle | None = None

    def add(
        self, method: str, path: str, status: int, *, tenant: str, key: str, request_id: str, refused: bool
    ) -> None:
        """Add a request. `key`: the id of its key, or a word. `refused`: it did not reach its route."""
        if refused and not self._has_room(key):
            self._left_out[key] += 1
            if self._due is None:
                self._due = asyncio.get_running_loop().call_later(_TOLD_AFTER, self.write)
            return
        facts = {
            "method": method,
            "status": status,
            "tenant": tenant or None,
            "key": key,
            "request_id": request_id,
        }
        _logger.info("%s %s %d", method, logged(path), status, extra=facts)

    def write(self) -> None:
        """Log how many lines were omitted since the last call, by key."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        left_out, self._left_out = self._left_out, Counter()
        for key, count in left_out.items():
            _logger.info("%d more refused requests are not listed", count, extra={"key": key})

    def _has_room(self, key: str) -> bool:
        now = self._clock()
        bucket = self._buckets.get(key)
        if bucket is None:
            saved = REFUSALS_AT_ONCE / _REFUSALS_PER_SECOND
            bucket = self._buckets[key] = TokenBucket(_REFUSALS_PER_SECOND, now, saved)
        self._buckets.move_to_end(key)
        while len(self._buckets) > _MOST_KEYS:
            self._buckets.popitem(last=False)
        if bucket.wait(_REFUSALS_PER_SECOND, now):
            return False
        bucket.take(1)
        return True
