"""Listings of a tenant's adapters, versions and examples, and moves of the live alias.

Nothing is fitted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from adapters.adaptation.repository import AdapterRepository
from adapters.completion import to_its_end
from adapters.registry.records import AdapterRecord, ExampleRecord, VersionRecord
from adapters.storage.artifact import MissingArtifact
from adapters.threads import DATABASE


class AdapterCatalog:
    """Reads the registry, off the event loop.

    Every read starts from the tenant, so that no tenant sees another's data.
    """

    def __init__(self, repository: AdapterRepository) -> None:
        self._repository = repository
        self._registry = repository.registry

    async def adapters(self, tenant: str, after: str | None, limit: int) -> list[AdapterRecord]:
        """Return the tenant's adapters, sorted by name."""
        return await DATABASE.run(self._registry.adapters, tenant, after, limit)

    async def adapter(self, tenant: str, name: str) -> AdapterRecord:
        """Return one adapter. Raises UnknownAdapter."""
        return await DATABASE.run(self._registry.adapter, tenant, name)

    async def versions(self, tenant: str, name: str) -> tuple[AdapterRecord, list[VersionRecord]]:
        """Return an adapter and its versions, newest first. Raises UnknownAdapter."""
        adapter = await self.adapter(tenant, name)
        return adapter, await DATABASE.run(self._registry.versions, adapter.uid)

    async def version(self, tenant: str, name: str, number: int) -> tuple[AdapterRecord, VersionRecord]:
        """Return an adapter and one of its versions. Raises UnknownAdapter, UnknownVersion."""
        adapter = await self.adapter(tenant, name)
        return adapter, await DATABASE.run(self._registry.version, adapter.uid, number)

    async def promote(self, tenant: str, name: str, number: int, if_match: str | None) -> AdapterRecord:
        """Point `live` at a version, see Registry.promote.

        Raises UnknownAdapter, UnknownVersion, AliasMoved.
        """
        adapter = await self.adapter(tenant, name)
        # The version is loaded before it goes live, so that no prediction in this process waits for it.
        await self._repository.aliases.prepare(
            await DATABASE.run(self._registry.resolve, tenant, name, number)
        )

        async def move() -> AdapterRecord:
            committed = await DATABASE.run(self._registry.promote, adapter.uid, number, if_match)
            await self._repository.settle(committed)
            return committed.adapter

        return await to_its_end(move())

    async def examples(
        self, tenant: str, name: str, after: str | None, limit: int, excluded: bool | None
    ) -> tuple[AdapterRecord, Sequence[ExampleRecord]]:
        """Return an adapter and its examples, see Registry.examples. Raises UnknownAdapter."""
        adapter = await self.adapter(tenant, name)
        read = partial(self._registry.examples, adapter.uid, after, limit, excluded)
        return adapter, await DATABASE.run(read)

    async def example(
        self, tenant: str, name: str, example_id: str
    ) -> tuple[AdapterRecord, ExampleRecord, bytes | str | None]:
        """Return an adapter, one of its examples, and the input if it is kept.

        Raises UnknownAdapter, UnknownExample.
        """
        adapter, record = await self._example(tenant, name, example_id)
        if record.inputs is None:
            return adapter, record, None
        try:
            return adapter, record, (await self._repository.inputs(adapter, record.inputs))[record.row]
        except MissingArtifact:
            # The example may just have been removed, or moved to another file.
            adapter, now = await self._example(tenant, name, example_id)
            if now.inputs in (None, record.inputs):
                raise
            return adapter, now, (await self._repository.inputs(adapter, now.inputs))[now.row]

    async def _example(self, tenant: str, name: str, example_id: str) -> tuple[AdapterRecord, ExampleRecord]:
        adapter = await self.adapter(tenant, name)
        return adapter, await DATABASE.run(self._registry.example, adapter.uid, example_id)
