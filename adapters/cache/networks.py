"""Fine-tuned networks in memory, bounded by their bytes, each behind a batcher of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from adapters.cache.lru import ByteLRU
from adapters.registry.records import Alias
from adapters.storage.artifact import Artifact, Store
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.batching.request import BatcherClosed

# A session's weights and buffers beside the bytes of its graph.
_BYTES_PER_BYTE = 1.5


@dataclass(slots=True, eq=False)
class _Running:
    """A network that answers. It is closed once it is retired and nobody uses it or waits for it."""

    key: str
    batcher: Batcher
    nbytes: int
    users: int = 0
    retired: bool = False


class NetworkPool:
    """Loads the networks of fine-tuned versions when they are asked for, or before. For one event loop.

    start(backbone) gives a batcher for it, to be started here. misses: predictions that waited for a load.
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
        """Of the networks that are kept, about; one in use while it is pushed out is not counted."""
        return self._kept.bytes

    @property
    def batchers(self) -> list[Batcher]:
        """Of all networks in memory, those that are pushed out and still in use too."""
        return [one.batcher for one in self._open]

    def abandon(self, batcher: Batcher) -> None:
        """Forgets the network of a batcher that is stuck: its callers are told, the next has it loaded."""
        batcher.abandon()
        for one in list(self._open):
            if one.batcher is batcher:
                self._kept.drop(one.key)
                self._retire(one)

    @asynccontextmanager
    async def running(self, alias: Alias, base: Backbone) -> AsyncIterator[Batcher]:
        """The batcher of the version's network, which stays as long as the block lasts.

        base: the backbone that it was fine-tuned from. Raises MissingArtifact, CorruptArtifact,
        StoreUnavailable, CorruptExport, and BatcherClosed after close.
        """
        assert alias.network is not None
        if alias.network.sha256 not in self._kept:
            self.misses += 1
        async with self._used(alias, alias.network, base) as one:
            yield one.batcher

    async def prepare(self, alias: Alias, base: Backbone) -> None:
        """Loads the network of a version that is to go live, if it has one and it can be kept.

        Raises as running does.
        """
        if alias.network is not None and _nbytes(alias.network) <= self._kept.max_bytes:
            async with self._used(alias, alias.network, base):
                pass

    def drop_of(self, tenant: str, name: str | None = None) -> None:
        """Let go of the tenant's networks, or of its adapter's of that name, once nobody uses them."""
        self._kept.drop_of(tenant, name)

    async def close(self) -> None:
        """Lets queued work end and closes every network, those in use and those being loaded too."""
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

        def read() -> Backbone:
            return base.with_network(self._store.read(alias.tenant, alias.uid, network))

        backbone = await asyncio.to_thread(read)
        self._refuse_if_closed()
        batcher = self._start(backbone)
        await batcher.start()
        one = _Running(network.sha256, batcher, _nbytes(network) + backbone.nbytes)
        self._open.add(one)
        return one

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise BatcherClosed("Fine-tuned networks are closed; restart the service if it is not stopping.")

    def _retire(self, one: _Running) -> None:
        one.retired = True
        self._close_unused()

    def _close_unused(self) -> None:
        for one in list(self._open):
            # Whoever waits for the load will use it, even where it is too large to be kept.
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
