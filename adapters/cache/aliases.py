"""Which version answers for which adapter, in memory, so that a prediction reads no database."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adapters.cache.lru import SingleFlight
from adapters.completion import to_its_end
from adapters.registry.errors import UnknownAdapter
from adapters.registry.records import Alias, Changed
from adapters.registry.registry import Registry
from adapters.threads import DATABASE

logger = logging.getLogger("topwork")

T = TypeVar("T")

_AGAIN_SECONDS = 0.5  # between two attempts to read aliases that other processes changed


@dataclass(slots=True)
class _Entry:
    """The known aliases of an adapter: the live one, and those of other versions that were requested.

    `coming`: the entry that replaces this one once its network is loaded.
    """

    live: Alias
    versions: dict[int, Alias] = field(default_factory=dict)
    coming: _Entry | None = None


async def _nothing(alias: Alias) -> None:
    """Load nothing."""


class AliasCache:
    """The aliases in use. For one event loop; not thread-safe.

    Commits of this process are passed to `put` and `drop` and take effect at once; those of other processes
    take effect when the ChangeFeed tells of them. A version with another network takes effect once that is
    loaded, `patience` seconds later at the latest; until then the previous version answers.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        max_entries: int = 100_000,
        patience: float = 10.0,
        load: Callable[[Alias], Awaitable[None]] = _nothing,
    ) -> None:
        """`load(alias)` loads what the alias's predictions need, and may raise."""
        self._registry = registry
        self._load = load
        self._patience = patience
        self._max_entries = max_entries
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._flights: SingleFlight[Alias] = SingleFlight()
        self._loads: set[asyncio.Task[None]] = set()
        self._asked: set[asyncio.Future[Any]] = set()
        self._behind: set[tuple[str, str]] = set()
        self._reader: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    async def close(self) -> None:
        """Stop loading; afterwards the cache does not read the database."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        for task in self._loads:
            task.cancel()
        await asyncio.gather(*self._loads, return_exceptions=True)
        await self._flights.close()
        # No query may outlive the registry.
        await asyncio.gather(*self._asked, return_exceptions=True)

    async def get(
        self, tenant: str, name: str, *, version: int | None = None, min_epoch: int | None = None
    ) -> Alias:
        """Return the alias of the live version, or of `version`; reads the database only if necessary.

        `min_epoch`: as returned by a commit; a process that knows an older epoch reads again. Raises
        UnknownAdapter, UnknownVersion, RegistryUnavailable.
        """
        key = (tenant, name)
        entry = self._at_least(key, min_epoch or 0)
        if entry is not None:
            self._entries.move_to_end(key)
        else:
            try:
                entry = await self._read(key)
            except UnknownAdapter:
                if min_epoch is None:
                    raise
                entry = None
            if entry is None or (min_epoch is not None and entry.live.epoch < min_epoch):
                # The joined load may have begun before the commit that the caller knows of.
                entry = await self._read(key)
        if version is None or version == entry.live.version:
            return entry.live
        return entry.versions.get(version) or await self._read_version(key, entry, version)

    def known(self, tenant: str, name: str) -> Alias | None:
        """Return the live version's alias as this process knows it, without asking the database."""
        entry = self._entries.get((tenant, name))
        return None if entry is None else entry.live

    def put(self, alias: Alias) -> None:
        """Store what this process has just committed; an alias older than the known one is ignored."""
        key = (alias.tenant, alias.name)
        self._flights.forget(key)
        self._keep(key, alias)

    def drop(self, tenant: str, name: str) -> None:
        """Forget an adapter that this process has just deleted."""
        self._flights.forget((tenant, name))
        self._entries.pop((tenant, name), None)

    def drop_tenant(self, tenant: str) -> None:
        """Forget all adapters of an erased tenant."""
        self._flights.forget_where(lambda key: isinstance(key, tuple) and key[0] == tenant)
        for key in [key for key in self._entries if key[0] == tenant]:
            del self._entries[key]

    def heard(self, change: Changed) -> None:
        """Drop an erased tenant, or read an adapter that has changed again in the background."""
        key = (change.tenant, change.name)
        if not change.name:
            if change.gone:
                self.drop_tenant(change.tenant)
            return
        # A read that began before the change must not be kept.
        self._flights.forget(key)
        entry = self._entries.get(key)
        if entry is not None and change.leaves_behind((entry.coming or entry).live):
            self._behind.add(key)
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._catch_up(), name="aliases")

    def clear(self) -> None:
        """Forget everything."""
        self._flights.forget_where(lambda key: True)
        self._entries.clear()

    async def prepare(self, alias: Alias) -> None:
        """Wait up to `patience` seconds until what the alias needs is loaded; a failed load is logged.

        Called before a commit of this process, so that the first prediction after it need not load.
        """
        try:
            async with asyncio.timeout(self._patience):
                await self._load(alias)
        # The first prediction loads it again, and reports the error.
        except Exception as error:
            logger.warning("version %s of %s is not loaded beforehand: %r", alias.version, alias.name, error)

    def _at_least(self, key: tuple[str, str], epoch: int) -> _Entry | None:
        """Return the entry if it is as new as the epoch; the coming one if no other can answer."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.coming is not None and (entry.live.version is None or entry.live.epoch < epoch):
            entry = entry.coming
        return entry if entry.live.epoch >= epoch else None

    async def _read(self, key: tuple[str, str]) -> _Entry:
        async def load() -> Alias:
            try:
                alias = await self._ask(self._registry.resolve, *key)
            except UnknownAdapter:
                if self._flights.current(key):
                    self._entries.pop(key, None)
                raise
            if self._flights.current(key):
                self._take_over(key, alias)
            return alias

        live = await self._flights.join(key, load)
        return self._at_least(key, live.epoch) or _Entry(live)

    async def _read_version(self, key: tuple[str, str], entry: _Entry, version: int) -> Alias:
        async def load() -> Alias:
            alias = await self._ask(self._registry.resolve, *key, version)
            if alias.epoch == entry.live.epoch:
                entry.versions[version] = alias
            return alias

        return await self._flights.join((*key, version, entry.live.epoch), load)

    def _take_over(self, key: tuple[str, str], alias: Alias) -> None:
        """Keep an alias that was read; a previous version answers until its network is loaded."""
        entry = self._entries.get(key)
        if entry is not None and entry.live.uid != alias.uid:
            # The adapter was deleted and created again: epochs of the two compare only as well as clocks do.
            del self._entries[key]
            entry = None
        if entry is None or alias.network in (None, entry.live.network):
            self._keep(key, alias)
            return
        coming = entry.coming
        if (coming or entry).live.epoch >= alias.epoch:
            return
        if coming is not None and coming.live.network == alias.network:
            # The wait for this network continues: further commits must not prolong it.
            coming.live, coming.versions = alias, {}
            return
        entry.coming = _Entry(alias)
        task = asyncio.create_task(self._switch(key, entry.coming))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    async def _switch(self, key: tuple[str, str], coming: _Entry) -> None:
        await self.prepare(coming.live)
        entry = self._entries.get(key)
        # Otherwise the adapter was deleted, or a newer entry is known or being loaded.
        if entry is not None and entry.coming is coming:
            self._entries[key] = coming

    def _keep(self, key: tuple[str, str], alias: Alias) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.live.epoch >= alias.epoch:
            return
        coming = None if entry is None else entry.coming
        newer = coming is not None and coming.live.epoch > alias.epoch
        self._entries[key] = _Entry(alias, coming=coming if newer else None)
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    async def _catch_up(self) -> None:
        """Read the adapters that are behind, one after another."""
        failing = False
        while self._behind:
            key = self._behind.pop()
            if key not in self._entries:
                continue
            try:
                await self._read(key)
            except UnknownAdapter:
                # The load has dropped it.
                continue
            # Predictions continue with the known aliases after any error.
            except Exception:
                if not failing:
                    logger.exception("changed adapters cannot be read; they answer as before until they can")
                failing = True
                self._behind.add(key)
                await asyncio.sleep(_AGAIN_SECONDS)

    async def _ask(self, question: Callable[..., T], *arguments: Any) -> T:
        """Query the database in a thread. The query outlives a cancelled caller, so `close` waits for it."""
        asked = asyncio.ensure_future(DATABASE.run(question, *arguments))
        self._asked.add(asked)
        asked.add_done_callback(self._asked.discard)
        return await to_its_end(asked)
