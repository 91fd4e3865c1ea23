"""A short-lived cache of tenants' keys, so that requests do not wait for the database."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from adapters.cache.lru import SingleFlight
from adapters.registry.errors import RegistryUnavailable
from adapters.registry.tenants import HeldKey
from adapters.threads import KEYS

logger = logging.getLogger("topwork")

# A revoked key must stop working within 5 seconds in every process.
_FRESH_SECONDS = 2.0  # older entries are refreshed in the background
_STALE_SECONDS = 4.0  # older entries are refreshed before they are used
_PATIENCE_SECONDS = 0.5  # longest wait for the database; after it, an entry is used for _FRESH_SECONDS more
_MOST = 10_000  # entries
# Requests with unknown keys could otherwise occupy every thread.
_READS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class _Read:
    """The result of reading one key. Times are by time.monotonic()."""

    key: HeldKey | None  # None if no key has this id
    at: float  # before the read began
    until: float  # after this, it is read again before it is used


class KeyCache:
    """Caches keys by id. For one event loop.

    `find`: reads one key and is called in a thread; it may raise RegistryUnavailable. While the database does
    not answer, cached keys stay valid.
    """

    def __init__(self, find: Callable[[str], HeldKey | None]) -> None:
        self._find = find
        self._known: OrderedDict[str, _Read] = OrderedDict()
        self._flights: SingleFlight[_Read] = SingleFlight()
        self._reading = asyncio.Semaphore(_READS_AT_ONCE)
        self._away = False

    async def get(self, key_id: str) -> HeldKey | None:
        """Return the key with this id, or None if it is not in use.

        Raises RegistryUnavailable if the key is not cached and the database does not answer.
        """
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
        """Forget the keys of an erased tenant. With `name` an adapter was erased, which has no keys."""
        if name is None:
            for key_id in [
                key_id for key_id, read in self._known.items() if read.key and read.key.tenant == tenant
            ]:
                del self._known[key_id]

    async def close(self) -> None:
        """Wait until no read of the database is running, and let none begin."""
        for _ in range(_READS_AT_ONCE):
            await self._reading.acquire()

    async def _looked_after(self, key_id: str, read: _Read) -> _Read:
        """Return the entry, refreshed first if it has expired and the database answers in time."""
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
            read = _Read(await KEYS.run(self._find, key_id), at, at + _STALE_SECONDS)
        self._away = False
        self._known[key_id] = read
        self._known.move_to_end(key_id)
        while len(self._known) > _MOST:
            self._known.popitem(last=False)
        return read
