"""Erasure of tenants and adapters: rows, memory, files and pages, in this process and in the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from adapters.adaptation.repository import AdapterRepository
from adapters.completion import to_its_end
from adapters.defaults import REWRITTEN_BYTES
from adapters.registry.erasures import NAME_TAKEN, Receipt, TenantErased
from adapters.registry.registry import Registry
from adapters.storage.artifact import Store
from adapters.threads import DATABASE

logger = logging.getLogger("topwork")

# Seconds after which no process can still write a file of what was erased: longer than a request lasts, and
# than a worker needs to learn that its job is gone.
_LATEST = 900.0
# Pause before the pages are cleared again, as a multiple of the time that the last clearing took.
_REST = 3.0
_LONGEST_REST = 60.0  # seconds, while something cannot be cleared yet


class TenantCache(Protocol):
    """A component that keeps data of tenants in memory."""

    def drop_of(self, tenant: str, name: str | None = None) -> None:
        """Drop the tenant's data, or only that of its adapter of this name."""
        ...


class Eraser:
    """Erases tenants and adapters. For one event loop.

    `memories`: all other components that keep tenants' data in memory. `end(tenant, why)`: aborts the
    tenant's open requests.
    """

    def __init__(
        self,
        repository: AdapterRepository,
        memories: Iterable[TenantCache],
        end: Callable[[str, Exception], None],
    ) -> None:
        self._repository = repository
        self._memories = (repository, *memories)
        self._end = end

    async def tenant(self, tenant: str) -> Receipt:
        """Erase the tenant with all its data, and abort its open requests.

        Other processes follow within one second; database pages, and files that were being written, within
        five. The erasure completes even if the caller is cancelled. Raises UnknownTenant.
        """

        async def erase() -> Receipt:
            receipt = await DATABASE.run(self._repository.registry.erasures.tenant, tenant)
            self._repository.aliases.drop_tenant(tenant)
            self.heard(tenant)
            await self._repository.delete_files_of(tenant)
            return receipt

        return await to_its_end(erase())

    async def adapter(self, tenant: str, name: str) -> Receipt:
        """Erase an adapter with all its data, and complete as `tenant` does. Raises UnknownAdapter."""

        async def erase() -> Receipt:
            receipt, uid = await DATABASE.run(self._repository.registry.delete_adapter, tenant, name)
            self._repository.aliases.drop(tenant, name)
            self.heard(tenant, name)
            await self._repository.delete_files_of(tenant, uid)
            return receipt

        return await to_its_end(erase())

    def heard(self, tenant: str, name: str | None = None) -> None:
        """Drop an erased adapter from memory, or an erased tenant, and abort the requests of the latter."""
        for memory in self._memories:
            memory.drop_of(tenant, name)
        if name is None:
            self._end(tenant, TenantErased(tenant))


class ErasureSweeper:
    """Deletes repeatedly what may still be left of erased adapters. Blocking, for one thread.

    A process that was writing a file when its adapter was erased deletes the file itself. If it was killed
    first, or the store was unavailable, a sweeper does, of any process: each round of an erasure's files is
    taken by one, and so is a clearing of pages. `rewritten_bytes`: see Remains.clear_pages.
    """

    def __init__(self, registry: Registry, store: Store, rewritten_bytes: int = REWRITTEN_BYTES) -> None:
        self._registry = registry
        self._store = store
        self._rewritten_bytes = rewritten_bytes

    def clear(self) -> None:
        """Run one round, a second or two after the last.

        Raises RegistryUnavailable, StoreUnavailable, StoreFull.
        """
        try:
            self._clear_pages()
        finally:
            # The database may be too busy, or its disk too full, to clear pages for hours.
            self._delete_files()

    def _delete_files(self) -> None:
        remains = self._registry.remains
        for erasure_id in remains.due_files():
            # Taken one by one, because a name is free again a few seconds after its tenant was erased.
            erasure = remains.take_files(erasure_id)
            if erasure is None:
                continue
            if erasure.whole and erasure.age < NAME_TAKEN - 1.0:
                # The tenant's name is still blocked, so the tenant cannot have created anything new.
                self._store.delete_tenant(erasure.tenant)
            for uid in erasure.uids:
                self._store.delete_adapter(erasure.tenant, uid)
            if erasure.age > _LATEST:
                remains.finish(erasure.id)

    def _clear_pages(self) -> None:
        """Clear the pages once for all erasures since the last time.

        Other writers to the database may have to wait meanwhile: the longer it takes, the longer the pause
        after it. The pause also grows with the age of what cannot be cleared yet.
        """
        if not self._registry.remains.uncleared:
            return
        with self._registry.chores.turn("clear", pause=0.0) as turn:
            if turn is None:
                return
            oldest = 0.0
            try:
                oldest = self._registry.remains.clear_pages(self._rewritten_bytes)
            finally:
                turn.pause = max(_REST * turn.seconds, min(oldest / 4.0, _LONGEST_REST))
