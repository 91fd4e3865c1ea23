"""A cache of tenants' keys, so that requests do not wait for the database."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from adapters.cache.lru import SingleFlight
from adapters.registry.errors import RegistryUnavailable
from adapters.registry.records import Changed
from adapters.registry.tenants import HeldKey
from adapters.threads import KEYS

logger = logging.getLogger("topwork")

_PATIENCE_SECONDS = 0.5  # longest wait for the database before a stale entry is used
_MOST = 10_000  # entries
# Requests with unknown keys could otherwise occupy every thread.
_READS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class _Lifetime:
    """Ages of an entry in seconds."""

    fresh: float  # older entries are refreshed in the background
    stale: float  # older entries are refreshed before they are used


# While other processes' changes are heard, a revoked key is dropped when that is heard.
_HEARING = _Lifetime(60.0, 120.0)
# Otherwise a revoked key must stop working within 5 seconds too.
_DEAF = _Lifetime(2.0, 4.0)


def _never() -> bool:
    """Hear nothing."""
    return False


@dataclass(frozen=True, slots=True)
class _Read:
    """The result of reading one key. Times are by the cache's clock."""

    key: HeldKey | None  # None if no key has this id
    at: float  # before the read began
    excused_until: float = 0.0  # until then it is used though stale, because the database did not answer


class KeyCache:
    """Caches keys by id. For one event loop.

    It is a Listener of the changes, which must be told to it. While the database does not answer, cached
    keys stay valid.
    """

    def __init__(
        self,
        find: Callable[[str], HeldKey | None],
        hearing: Callable[[], bool] = _never,
        *,
        patience: float = _PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`find`: reads one key and is called in a thread; it may raise RegistryUnavailable.

        `hearing()`: whether all changes up to a few seconds ago have been heard.
        """
        self._find = find
        self._hearing = hearing
        self._patience = patience
        self._clock = clock
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
        if key is None or (key.in_use_for is not None and self._clock() - read.at >= key.in_use_for):
            return None
        return key

    def heard(self, change: Changed) -> None:
        """Forget the keys of a tenant whose keys or quotas have changed, or all keys."""
        if not change.tenant:
            self.clear()
        else:
            self.drop_of(change.tenant, change.name or None)

    def drop_of(self, tenant: str, name: str | None = None) -> None:
        """Forget the keys of the tenant. With `name`, an adapter of it has changed, which has no keys."""
        if name is not None:
            return

        def may_be_theirs(key_id: object) -> bool:
            read = self._known.get(str(key_id))
            return read is None or read.key is None or read.key.tenant == tenant

        # A read that began before the change must not be kept.
        self._flights.forget_where(may_be_theirs)
        for key_id in [id for id, read in self._known.items() if read.key and read.key.tenant == tenant]:
            del self._known[key_id]

    def clear(self) -> None:
        """Forget all keys."""
        self._flights.forget_where(lambda key_id: True)
        self._known.clear()

    async def close(self) -> None:
        """Wait until no read of the database is running, and let none begin."""
        for _ in range(_READS_AT_ONCE):
            await self._reading.acquire()

    async def _looked_after(self, key_id: str, read: _Read) -> _Read:
        """Return the entry, refreshed first if it is stale and the database answers in time."""
        now = self._clock()
        lifetime = _HEARING if self._hearing() else _DEAF
        if now - read.at < lifetime.fresh:
            return read
        if now - read.at < lifetime.stale or now < read.excused_until:
            self._flights.begin(key_id, lambda: self._read(key_id))
            return read
        try:
            async with asyncio.timeout(self._patience):
                return await self._flights.join(key_id, lambda: self._read(key_id))
        except (TimeoutError, RegistryUnavailable):
            if not self._away:
                logger.warning("keys cannot be read; those that are known go on as they were")
            self._away = True
        known = self._known.get(key_id)
        if known is None:
            # A change of it was heard meanwhile.
            return await self._flights.join(key_id, lambda: self._read(key_id))
        if known is read:
            known = self._known[key_id] = replace(read, excused_until=self._clock() + _DEAF.fresh)
        return known

    async def _read(self, key_id: str) -> _Read:
        async with self._reading:
            at = self._clock()
            read = _Read(await KEYS.run(self._find, key_id), at)
        self._away = False
        if self._flights.current(key_id):
            self._known[key_id] = read
            self._known.move_to_end(key_id)
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
        return read
