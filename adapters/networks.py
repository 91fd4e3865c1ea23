"""Fine-tuned networks in memory, bounded by their bytes, each behind a batcher of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from adapters.cache import Cache
from adapters.records import Alias
from adapters.store import Store, StoreError
from models.backbone import Backbone
from models.batcher import Batcher
from models.manifest import CorruptExport

logger = logging.getLogger("topwork")

# A session's weights and buffers beside the bytes of its graph.
_BYTES_PER_BYTE = 1.5


@dataclass(slots=True)
class _Running:
    """A network that answers. It is closed once it is retired and nobody uses it."""

    batcher: Batcher
    nbytes: int
    users: int = 0
    retired: bool = False
    closed: bool = False


class Networks:
    """Loads the networks of fine-tuned versions when they are asked for, or foreseen. For one event loop.

    start(backbone) gives a batcher for it, started.
    """

    def __init__(self, store: Store, max_bytes: int, start: Callable[[Backbone], Batcher]) -> None:
        self._store = store
        self._start = start
        self._running: Cache[_Running] = Cache(max_bytes, lambda one: one.nbytes, self._retire)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def bytes(self) -> int:
        """Of the networks in memory, about."""
        return self._running.bytes

    @asynccontextmanager
    async def running(self, alias: Alias, base: Backbone) -> AsyncIterator[Batcher]:
        """The batcher of the version's network, which stays as long as the block lasts.

        base: the backbone that it was fine-tuned from. Raises MissingArtifact, CorruptArtifact,
        StoreUnavailable, CorruptExport.
        """
        one = await self._get(alias, base)
        one.users += 1
        try:
            yield one.batcher
        finally:
            one.users -= 1
            self._close_unused(one)

    def foresee(self, alias: Alias, base: Backbone) -> None:
        """Loads the network of a version that has just gone live, so that its first prediction need not."""

        async def load() -> None:
            try:
                async with self.running(alias, base):
                    pass
            except (StoreError, CorruptExport) as error:
                logger.warning("the network of %s is not loaded yet: %s", alias.name, error)

        if alias.network is not None:
            self._keep(asyncio.create_task(load()))

    async def close(self) -> None:
        """Lets queued work end and closes every network."""
        self._running.clear()
        await asyncio.gather(*self._tasks)

    async def _get(self, alias: Alias, base: Backbone) -> _Running:
        network = alias.network
        assert network is not None

        async def load() -> _Running:
            def read() -> Backbone:
                return base.with_network(self._store.read(alias.tenant, alias.uid, network))

            backbone = await asyncio.to_thread(read)
            batcher = self._start(backbone)
            await batcher.start()
            return _Running(batcher, int(network.length * _BYTES_PER_BYTE))

        while True:
            one = await self._running.get(network.sha256, load)
            if network.sha256 not in self._running:
                # Larger than all that may be kept, or pushed out a moment ago.
                one.retired = True
            if not one.closed:
                return one

    def _retire(self, one: _Running) -> None:
        one.retired = True
        self._close_unused(one)

    def _close_unused(self, one: _Running) -> None:
        if not one.retired or one.users or one.closed:
            return
        one.closed = True

        async def close() -> None:
            await one.batcher.close()
            one.batcher.backbone.close()

        self._keep(asyncio.create_task(close()))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
