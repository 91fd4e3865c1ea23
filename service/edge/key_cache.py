"""Keys of tenants as the database had them a moment ago, so that a request reads no database."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from adapters.cache.lru import SingleFlight
from adapters.registry.records import RegistryUnavailable
from adapters.registry.tenants import HeldKey

logger = logging.getLogger("topwork")

# A key that is asked for is read again beside the answer after so long, and before it after twice as long:
# what is revoked opens nothing any more within 5 seconds, in every process.
_FRESH_SECONDS = 2.0
_STALE_SECONDS = 4.0
# So long a database that does not answer is waited for.
_PATIENCE_SECONDS = 0.5
_MOST = 10_000
# Keys that nobody has would otherwise take every thread there is.
_READS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class _Read:
    """key: None where there is none of that id. Times by time.monotonic(). at: before the reading began.
    until: when it must be read again before it is used.
    """

    key: HeldKey | None
    at: float
    until: float


class KeyCache:
    """For one event loop. find(id) reads one key, in a thread; it may raise RegistryUnavailable.

    While the database does not answer, keys that were read before go on as they were.
    """

    def __init__(self, find: Callable[[str], HeldKey | None]) -> None:
        self._find = find
        self._known: OrderedDict[str, _Read] = OrderedDict()
        self._flights: SingleFlight[_Read] = SingleFlight()
        self._reading = asyncio.Semaphore(_READS_AT_ONCE)
        self._away = False

    async def get(self, key_id: str) -> HeldKey | None:
        """The key of that id while it is in use. Raises RegistryUnavailable for one that is not known."""
        read = self._known.get(key_id)
        if read is None:
            read = await self._flights.join(key_id, lambda: self._read(key_id))
        else:
            self._known.move_to_end(key_id)
            read = await self._looked_after(key_id, read)
        key = read.key
        if key is None or (key.in_use_for is not None and time.monotonic() - read.at >= key.in_use_for):
            return None
        return key

    def drop_of(self, tenant: str, name: str | None = None) -> None:
        """Forget the keys of a tenant that was erased; an adapter has none."""
        if name is None:
            for key_id in [
                key_id for key_id, read in self._known.items() if read.key and read.key.tenant == tenant
            ]:
                del self._known[key_id]

    async def close(self) -> None:
        """Waits until nothing of it reads the database."""
        for _ in range(_READS_AT_ONCE):
            await self._reading.acquire()

    async def _looked_after(self, key_id: str, read: _Read) -> _Read:
        """What was read, or what is read anew where that is too old."""
        now = time.monotonic()
        if now < read.at + _FRESH_SECONDS:
            return read
        if now < read.until:
            self._flights.begin(key_id, lambda: self._read(key_id))
            return read
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                return await self._flights.join(key_id, lambda: self._read(key_id))
        except (TimeoutError, RegistryUnavailable):
            if not self._away:
                logger.warning("keys cannot be read; those that are known go on as they were")
            self._away = True
        read = self._known[key_id] = replace(read, until=time.monotonic() + _FRESH_SECONDS)
        return read

    async def _read(self, key_id: str) -> _Read:
        async with self._reading:
            at = time.monotonic()
            read = _Read(await asyncio.to_thread(self._find, key_id), at, at + _STALE_SECONDS)
        self._away = False
        self._known[key_id] = read
        self._known.move_to_end(key_id)
        while len(self._known) > _MOST:
            self._known.popitem(last=False)
        return read
