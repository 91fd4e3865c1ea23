"""Erasure as a whole: rows, memory, files and pages, here and in the other processes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from adapters.adaptation.repository import AdapterRepository
from adapters.completion import to_its_end
from adapters.registry.erasures import NAME_TAKEN, Receipt, TenantErased
from adapters.registry.registry import Registry
from adapters.storage.artifact import Store

logger = logging.getLogger("topwork")

# Seconds after which nobody is left who could still bring a file of what was erased: longer than a request
# lasts, and than a worker needs to hear that its job is gone.
_LATEST = 900.0
# Of what clearing the pages took.
_REST = 3.0


class Keeps(Protocol):
    """What has something of tenants in memory."""

    def drop_of(self, tenant: str, name: str | None = None) -> None:
        """Forget what is the tenant's, or of its adapter of that name."""
        ...


class Eraser:
    """Erases tenants and adapters. For one event loop.

    memories: all that has something of them in memory. end(tenant, why): breaks off what is done for one.
    """

    def __init__(
        self, repository: AdapterRepository, memories: Iterable[Keeps], end: Callable[[str, Exception], None]
    ) -> None:
        self._repository = repository
        self._memories = (repository, *memories)
        self._end = end

    async def tenant(self, tenant: str) -> Receipt:
        """Erases the tenant with all that it has, and breaks off what is being done for it.

        Other processes follow within a second, pages of the database and files that somebody was just writing
        within five. It runs to its end when the caller is cancelled. Raises UnknownTenant.
        """

        async def erase() -> Receipt:
            receipt = await asyncio.to_thread(self._repository.registry.erasures.tenant, tenant)
            self._repository.aliases.drop_tenant(tenant)
            self.heard(tenant)
            await self._repository.drop_files(tenant)
            return receipt

        return await to_its_end(erase())

    async def adapter(self, tenant: str, name: str) -> Receipt:
        """Erases an adapter with all that it has. As `tenant`. Raises UnknownAdapter."""

        async def erase() -> Receipt:
            receipt, uid = await asyncio.to_thread(self._repository.registry.delete_adapter, tenant, name)
            self._repository.aliases.drop(tenant, name)
            self.heard(tenant, name)
            await self._repository.drop_files(tenant, uid)
            return receipt

        return await to_its_end(erase())

    def heard(self, tenant: str, name: str | None = None) -> None:
        """Something of the adapter was erased, or the whole tenant: lets go of what is in memory."""
        for memory in self._memories:
            memory.drop_of(tenant, name)
        if name is None:
            self._end(tenant, TenantErased(tenant))


class ErasureSweeper:
    """Deletes again and again what may still come of what was erased. Blocking, for one thread.

    Whoever was writing a file when its adapter was erased deletes it again; where it was killed in between,
    or the store was away, this does.
    """

    def __init__(self, registry: Registry, store: Store) -> None:
        self._registry = registry
        self._store = store
        self._seen: dict[str, float] = {}
        self._cleared: str | None = None
        self._rest_until = 0.0

    def clear(self) -> None:
        """One round, a second or two after the last.

        Raises RegistryUnavailable, StoreUnavailable, StoreFull.
        """
        self._clear_pages()
        unfinished = self._registry.erasures.unfinished()
        known = self._seen
        self._seen = {one.id: known.get(one.id, 0.0) for one in unfinished}
        for erasure in unfinished:
            # Each time after twice as long: a deletion of many adapters must not be made up by ten thousands.
            if erasure.age < 2.0 * self._seen[erasure.id]:
                continue
            if erasure.whole and erasure.age < NAME_TAKEN - 1.0:
                # Nobody can have created anything since.
                self._store.delete_tenant(erasure.tenant)
            for uid in erasure.uids:
                self._store.delete_adapter(erasure.tenant, uid)
            self._seen[erasure.id] = max(erasure.age, 0.5)
            if erasure.age > _LATEST:
                self._registry.erasures.finish(erasure.id)

    def _clear_pages(self) -> None:
        """Once for all erasures since the last time. Others write to the database meanwhile, or wait: where
        it takes long, they get longer in between.
        """
        newest = self._registry.erasures.newest()
        begun = time.monotonic()
        if newest == self._cleared or begun < self._rest_until:
            return
        self._registry.erasures.clear_pages()
        self._cleared = newest
        self._rest_until = time.monotonic() + _REST * (time.monotonic() - begun)
