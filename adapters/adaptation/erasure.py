"""Erasure of tenants and adapters: rows, memory, files and pages, in this process and in the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from adapters.adaptation.repository import AdapterRepository
from adapters.completion import to_its_end
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
    first, or the store was unavailable, the sweeper does.
    """

    def __init__(self, registry: Registry, store: Store) -> None:
        self._registry = registry
        self._store = store
        self._seen: dict[str, float] = {}
        self._cleared: str | None = None
        self._rest_until = 0.0

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
        unfinished = self._registry.erasures.unfinished()
        known = self._seen
        self._seen = {one.id: known.get(one.id, 0.0) for one in unfinished}
        for erasure in unfinished:
            # The interval doubles: an erasure of many adapters must not cause tens of thousands of deletions.
            if erasure.age < 2.0 * self._seen[erasure.id]:
                continue
            if erasure.whole and erasure.age < NAME_TAKEN - 1.0:
                # The tenant's name is still blocked, so the tenant cannot have created anything new.
                self._store.delete_tenant(erasure.tenant)
            for uid in erasure.uids:
                self._store.delete_adapter(erasure.tenant, uid)
            self._seen[erasure.id] = max(erasure.age, 0.5)
            if erasure.age > _LATEST:
                self._registry.erasures.finish(erasure.id)

    def _clear_pages(self) -> None:
        """Clear the pages once for all erasures since the last time.

        Other writers to the database may have to wait meanwhile: the longer it takes, the longer the pause
        after it.
        """
        newest = self._registry.erasures.newest()
        begun = time.monotonic()
        if newest == self._cleared or begun < self._rest_until:
            return
        try:
            self._registry.erasures.clear_pages()
            self._cleared = newest
        finally:
            self._rest_until = time.monotonic() + _REST * (time.monotonic() - begun)
