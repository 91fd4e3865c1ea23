"""Fine-tuned networks in memory, bounded by bytes, each behind its own batcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from adapters.cache.lru import ByteLRU
from adapters.registry.records import Alias
from adapters.storage.artifact import Artifact, Store
from adapters.threads import STORE
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.batching.request import BatcherClosed

# Memory of a session's weights and buffers, in bytes per byte of its graph.
_BYTES_PER_BYTE = 1.5


@dataclass(slots=True, eq=False)
class _Running:
    """A network in memory. It is closed once it is retired and no caller uses it or waits for it."""

    key: str
    batcher: Batcher
    nbytes: int
    users: int = 0
    retired: bool = False


class NetworkPool:
    """Loads the networks of fine-tuned versions on demand or in advance. For one event loop.

    `start(backbone)` returns a batcher for it, which is started here. `misses`: predictions that waited for a
    load.
    """

    def __init__(self, store: Store, max_bytes: int, start: Callable[[Backbone], Batcher]) -> None:
        self.misses = 0
        self._store = store
        self._start = start
        self._kept: ByteLRU[_Running] = ByteLRU(max_bytes, lambda one: one.nbytes, self._retire)
        self._open: set[_Running] = set()
        self._waiting: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    @property
    def bytes(self) -> int:
        """Approximate size of the kept networks; one evicted while in use is not counted."""
        return self._kept.bytes

    @property
    def batchers(self) -> list[Batcher]:
        """The batchers of all networks in memory, including evicted ones that are still in use."""
        return [one.batcher for one in self._open]

    def abandon(self, batcher: Batcher) -> None:
        """Drop the network of a stuck batcher: its callers get an error, the next caller reloads it."""
        batcher.abandon()
        for one in list(self._open):
            if one.batcher is batcher:
                self._kept.drop(one.key)
                self._retire(one)

    @asynccontextmanager
    async def running(self, alias: Alias, base: Backbone) -> AsyncIterator[Batcher]:
        """Yield the batcher of the version's network, which stays in memory during the block.

        `base`: the backbone that it was fine-tuned from. Raises MissingArtifact, CorruptArtifact,
        StoreUnavailable, CorruptExport, and BatcherClosed after close.
        """
        assert alias.network is not None
        if alias.network.sha256 not in self._kept:
            self.misses += 1
        async with self._used(alias, alias.network, base) as one:
            yield one.batcher

    async def prepare(self, alias: Alias, base: Backbone) -> None:
        """Load the network of a version that is about to go live, if it has one and it can be kept.

        Raises what `running` raises.
        """
        if alias.network is not None and _nbytes(alias.network) <= self._kept.max_bytes:
            async with self._used(alias, alias.network, base):
                pass

    def drop_of(self, tenant: str, name: str | None = None) -> None:
        """Drop the tenant's networks, or those of its adapter of this name, once no caller uses them."""
        self._kept.drop_of(tenant, name)

    async def close(self) -> None:
        """Finish queued work and close every network, including those in use and those being loaded."""
        self._closed = True
        self._kept.clear()
        for one in list(self._open):
            self._close(one)
        if self._tasks:
            await asyncio.wait(self._tasks)

    @asynccontextmanager
    async def _used(self, alias: Alias, network: Artifact, base: Backbone) -> AsyncIterator[_Running]:
        async def load() -> _Running:
            self._track(asyncio.current_task())
            return await self._load(alias, network, base)

        self._waiting.append(network.sha256)
        try:
            one = await self._kept.get(network.sha256, load, (alias.tenant, alias.name))
            one.users += 1
        finally:
            self._waiting.remove(network.sha256)
            self._close_unused()
        try:
            yield one
        finally:
            one.users -= 1
            self._close_unused()

    async def _load(self, alias: Alias, network: Artifact, base: Backbone) -> _Running:
        self._refuse_if_closed()
        graph = await STORE.run(self._store.read, alias.tenant, alias.uid, network)
        backbone = await asyncio.to_thread(base.with_network, graph)
        del graph
        if self._closed:
            await asyncio.to_thread(backbone.close)
        self._refuse_if_closed()
        batcher = self._start(backbone)
        await batcher.start()
        one = _Running(network.sha256, batcher, _nbytes(network) + backbone.nbytes)
        self._open.add(one)
        return one

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise BatcherClosed("The service is stopping. If it is not, restart it.")

    def _retire(self, one: _Running) -> None:
        one.retired = True
        self._close_unused()

    def _close_unused(self) -> None:
        for one in list(self._open):
            # A caller that waits for the load will use the network, even if it is too large to be kept.
            if one.retired and not one.users and one.key not in self._waiting:
                self._close(one)

    def _close(self, one: _Running) -> None:
        self._open.discard(one)

        async def close() -> None:
            await one.batcher.close()
            one.batcher.backbone.close()

        self._track(asyncio.create_task(close()))

    def _track(self, task: asyncio.Task[Any] | None) -> None:
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _nbytes(network: Artifact) -> int:
    return int(network.length * _BYTES_PER_BYTE)
