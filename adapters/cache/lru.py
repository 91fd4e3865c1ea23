"""Caches of loaded objects, bounded by bytes."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")
Owner = tuple[str, str | None]
"""A tenant, and the name of its adapter if known."""


class SingleFlight(Generic[T]):
    """One load at a time per key, shared by all callers that ask for it meanwhile. For one event loop.

    A load runs in its own task, so it continues if a caller is cancelled. All waiting callers see its error.
    """

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[T]] = {}

    async def join(self, key: Hashable, load: Callable[[], Awaitable[T]]) -> T:
        """Return the result of the load in progress, or of a new one."""
        return await asyncio.shield(self.begin(key, load))

    def begin(self, key: Hashable, load: Callable[[], Awaitable[T]]) -> asyncio.Task[T]:
        """Return the task of the load in progress, or of a new one. It need not be awaited."""
        task = self._tasks.get(key)
        if task is None or task.done():
            task = self._tasks[key] = asyncio.create_task(self._run(load))
            task.add_done_callback(lambda done: self._land(key, done))
        return task

    def forget(self, key: Hashable) -> None:
        """Make later callers begin a new load; those already waiting still get the old one."""
        self._tasks.pop(key, None)

    def forget_where(self, which: Callable[[Hashable], bool]) -> None:
        """Forget every key for which `which` returns True."""
        for key in [key for key in self._tasks if which(key)]:
            self.forget(key)

    def current(self, key: Hashable) -> bool:
        """Return whether the running task is the key's load, and was not forgotten since it began."""
        return self._tasks.get(key) is asyncio.current_task()

    async def close(self) -> None:
        """Cancel the loads in progress."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _run(load: Callable[[], Awaitable[T]]) -> T:
        return await load()

    def _land(self, key: Hashable, task: asyncio.Task[T]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        # If every caller was cancelled, the error is retrieved here: asyncio would complain otherwise.
        if not task.cancelled():
            task.exception()


class ByteLRU(Generic[T]):
    """An LRU cache bounded by bytes; each key is loaded once at a time. For one event loop; not thread-safe.

    Keys are the sha256 of the bytes that an object was loaded from, or as unambiguous: no key ever means two
    objects. An owner is a tenant and, if known, the name of its adapter, whose entries `drop_of` drops.
    Counters since the start: `hits`, `misses`, `evictions`. Current values: `bytes`, len(cache).
    """

    def __init__(
        self, max_bytes: int, size_of: Callable[[T], int], leave: Callable[[T], None] = lambda thing: None
    ) -> None:
        """`leave(thing)` is called with what is evicted or dropped, or was loaded but is not kept."""
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.bytes = 0
        self._size_of = size_of
        self._leave = leave
        self._entries: OrderedDict[str, tuple[T, int, Owner]] = OrderedDict()
        self._loading: dict[str, Owner] = {}
        self._flights: SingleFlight[T] = SingleFlight()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    async def get(self, key: str, load: Callable[[], Awaitable[T]], owner: Owner) -> T:
        """Return the object under the key, loaded for the owner if it is missing.

        Callers that come during the load share it, and its error, which is not kept. The load continues if a
        caller is cancelled. An object larger than the bound is returned, but not kept.
        """
        entry = self._entries.get(key)
        if entry is not None:
            self.hits += 1
            self._entries.move_to_end(key)
            return entry[0]
        self.misses += 1

        async def load_and_keep() -> T:
            self._loading[key] = owner
            try:
                thing = await load()
            finally:
                if self._flights.current(key):
                    del self._loading[key]
            if not self._flights.current(key) or not self._keep(key, thing, owner):
                self._leave(thing)
            return thing

        return await self._flights.join(key, load_and_keep)

    def drop(self, key: str) -> None:
        """Drop the key, and the load in progress for it."""
        self._flights.forget(key)
        self._loading.pop(key, None)
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry[1]
            self._leave(entry[0])

    def drop_of(self, tenant: str, name: str | None = None) -> None:
        """Drop the tenant's entries and loads in progress, or only those of its adapter of this name."""

        def theirs(owner: Owner) -> bool:
            return owner[0] == tenant and (name is None or owner[1] in (name, None))

        owners = {key: entry[2] for key, entry in self._entries.items()} | self._loading
        for key, owner in owners.items():
            if theirs(owner):
                self.drop(key)

    def clear(self) -> None:
        """Drop all entries."""
        for key in list(self._entries):
            self.drop(key)

    def _keep(self, key: str, thing: T, owner: Owner) -> bool:
        """Make room for the object and keep it; return False if it is larger than the bound."""
        size = self._size_of(thing)
        if size > self.max_bytes:
            return False
        while self.bytes + size > self.max_bytes:
            _, (left, freed, _) = self._entries.popitem(last=False)
            self.bytes -= freed
            self.evictions += 1
            self._leave(left)
        self._entries[key] = (thing, size, owner)
        self.bytes += size
        return True
