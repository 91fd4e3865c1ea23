"""Which version answers for which adapter, in memory, so that a prediction reads no database."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from adapters.cache import Flights
from adapters.records import Alias, Changed, UnknownAdapter
from adapters.registry import CHANGES_KEPT, Registry

logger = logging.getLogger("topwork")

# Commits become visible a little after the time that they carry.
_OVERLAP_SECONDS = 10.0
_FORGIVEN_SECONDS = CHANGES_KEPT - 60.0


@dataclass(slots=True)
class _Entry:
    """What is known of an adapter: its live alias, and those of its other versions that were asked for."""

    live: Alias
    versions: dict[int, Alias] = field(default_factory=dict)


class Aliases:
    """The aliases in use. For one event loop; not thread-safe.

    This process's own commits are told by `put` and `drop` and hold at once; those of other processes are
    polled and hold after `interval` seconds or a little more.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        max_entries: int = 100_000,
        interval: float = 0.5,
        arrived: Callable[[Alias], None] = lambda alias: None,
    ) -> None:
        """arrived(alias) is called with every alias that is new here, on the event loop."""
        self._registry = registry
        self._arrived = arrived
        self._max_entries = max_entries
        self._interval = interval
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._flights: Flights[Alias] = Flights()
        self._poller: asyncio.Task[None] | None = None
        self._polled_at = time.monotonic()
        self._failing = False

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def alive(self) -> bool:
        """Whether other processes' commits are being polled for."""
        return self._poller is not None and not self._poller.done()

    async def start(self) -> None:
        """Start polling for other processes' commits."""
        self._polled_at = time.monotonic()
        self._poller = asyncio.create_task(self._poll_forever(), name="aliases")

    async def close(self) -> None:
        """Stop polling."""
        if self._poller is not None:
            self._poller.cancel()
            with suppress(asyncio.CancelledError):
                await self._poller
            self._poller = None
        await self._flights.close()

    async def get(
        self, tenant: str, name: str, *, version: int | None = None, min_epoch: int | None = None
    ) -> Alias:
        """The alias of the live version, or of the one asked for; reads the database only when it must.

        With `min_epoch`, as answered by a commit, a process that knows less reads again. Raises
        UnknownAdapter, UnknownVersion, RegistryUnavailable.
        """
        key = (tenant, name)
        entry = self._entries.get(key)
        if entry is not None and (min_epoch is None or entry.live.epoch >= min_epoch):
            self._entries.move_to_end(key)
        else:
            try:
                entry = await self._read(key)
            except UnknownAdapter:
                if min_epoch is None:
                    raise
                entry = None
            if entry is None or (min_epoch is not None and entry.live.epoch < min_epoch):
                # The load that was joined may have begun before the commit that the caller knows of.
                entry = await self._read(key)
        if version is None or version == entry.live.version:
            return entry.live
        return entry.versions.get(version) or await self._read_version(key, entry, version)

    def known(self, tenant: str, name: str) -> Alias | None:
        """The live version's alias as this process knows it, without asking the database."""
        entry = self._entries.get((tenant, name))
        return None if entry is None else entry.live

    def put(self, alias: Alias) -> None:
        """Take over what this process has just committed; older news than what is known is ignored."""
        key = (alias.tenant, alias.name)
        self._flights.forget(key)
        self._keep(key, alias)

    def drop(self, tenant: str, name: str) -> None:
        """Forget an adapter that this process has just deleted."""
        self._flights.forget((tenant, name))
        self._entries.pop((tenant, name), None)

    async def _read(self, key: tuple[str, str]) -> _Entry:
        async def load() -> Alias:
            try:
                alias = await asyncio.to_thread(self._registry.resolve, *key)
            except UnknownAdapter:
                if self._flights.current(key):
                    self._entries.pop(key, None)
                raise
            if self._flights.current(key):
                self._keep(key, alias)
            return alias

        live = await self._flights.join(key, load)
        entry = self._entries.get(key)
        return entry if entry is not None and entry.live.epoch >= live.epoch else _Entry(live)

    async def _read_version(self, key: tuple[str, str], entry: _Entry, version: int) -> Alias:
        async def load() -> Alias:
            alias = await asyncio.to_thread(self._registry.resolve, *key, version)
            if alias.epoch == entry.live.epoch:
                entry.versions[version] = alias
            return alias

        return await self._flights.join((*key, version, entry.live.epoch), load)

    def _keep(self, key: tuple[str, str], alias: Alias) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.live.epoch >= alias.epoch:
            return
        self._entries[key] = _Entry(alias)
        self._arrived(alias)
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self._poll()
                if self._failing:
                    logger.warning("other processes' commits can be read again")
                self._failing = False
            # Whatever the database's trouble is, predictions go on with what is known, and the poll must too.
            except Exception:
                if not self._failing:
                    logger.exception(
                        "other processes' commits cannot be read; serving goes on with what is known"
                    )
                self._failing = True

    async def _changed(self, seconds: float) -> list[Changed]:
        reading = asyncio.ensure_future(asyncio.to_thread(self._registry.changed, seconds))
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            # A thread goes on when its caller is cancelled, and must not outlive the registry.
            await asyncio.wait([reading])
            raise

    async def _poll(self) -> None:
        began = time.monotonic()
        missed = began - self._polled_at
        if missed > _FORGIVEN_SECONDS:
            # The database no longer remembers all that changed since.
            self._entries.clear()
        for change in await self._changed(missed + _OVERLAP_SECONDS):
            key = (change.tenant, change.name)
            entry = self._entries.get(key)
            if entry is not None and entry.live.epoch < change.epoch:
                # The adapter may be gone, which the load has then noted.
                with suppress(UnknownAdapter):
                    await self._read(key)
        self._polled_at = began
