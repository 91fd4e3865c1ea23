"""What a tenant looks at and moves about: adapters, versions, examples, the live alias.

Nothing is fitted here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from adapters.adaptation.repository import AdapterRepository
from adapters.completion import to_its_end
from adapters.registry.records import AdapterRecord, ExampleRecord, VersionRecord
from adapters.storage.artifact import MissingArtifact


class AdapterCatalog:
    """Reads of the registry, off the event loop.

    Everything starts from the tenant, so that none sees another's.
    """

    def __init__(self, repository: AdapterRepository) -> None:
        self._repository = repository
        self._registry = repository.registry

    async def adapters(self, tenant: str, after: str | None, limit: int) -> list[AdapterRecord]:
        """The tenant's adapters in the order of their names."""
        return await asyncio.to_thread(self._registry.adapters, tenant, after, limit)

    async def adapter(self, tenant: str, name: str) -> AdapterRecord:
        """One adapter. Raises UnknownAdapter."""
        return await asyncio.to_thread(self._registry.adapter, tenant, name)

    async def versions(self, tenant: str, name: str) -> tuple[AdapterRecord, list[VersionRecord]]:
        """An adapter and its versions, the newest first. Raises UnknownAdapter."""
        adapter = await self.adapter(tenant, name)
        return adapter, await asyncio.to_thread(self._registry.versions, adapter.uid)

    async def version(self, tenant: str, name: str, number: int) -> tuple[AdapterRecord, VersionRecord]:
        """An adapter and one of its versions. Raises UnknownAdapter, UnknownVersion."""
        adapter = await self.adapter(tenant, name)
        return adapter, await asyncio.to_thread(self._registry.version, adapter.uid, number)

    async def promote(self, tenant: str, name: str, number: int, if_match: str | None) -> AdapterRecord:
        """Points `live` at a version, see Registry.promote.

        Raises UnknownAdapter, UnknownVersion, AliasMoved.
        """
        adapter = await self.adapter(tenant, name)
        # Loaded before it is live anywhere, so that no prediction waits for it here.
        await self._repository.aliases.prepare(
            await asyncio.to_thread(self._registry.resolve, tenant, name, number)
        )

        async def move() -> AdapterRecord:
            committed = await asyncio.to_thread(self._registry.promote, adapter.uid, number, if_match)
            await self._repository.settle(committed)
            return committed.adapter

        return await to_its_end(move())

    async def examples(
        self, tenant: str, name: str, after: str | None, limit: int, excluded: bool | None
    ) -> tuple[AdapterRecord, Sequence[ExampleRecord]]:
        """An adapter and its examples, see Registry.examples. Raises UnknownAdapter."""
        adapter = await self.adapter(tenant, name)
        read = partial(self._registry.examples, adapter.uid, after, limit, excluded)
        return adapter, await asyncio.to_thread(read)

    async def example(
        self, tenant: str, name: str, example_id: str
    ) -> tuple[AdapterRecord, ExampleRecord, bytes | str | None]:
        """An adapter, one of its examples, and its input if it is kept.

        Raises UnknownAdapter, UnknownExample.
        """
        adapter, record = await self._example(tenant, name, example_id)
        if record.inputs is None:
            return adapter, record, None
        try:
            return adapter, record, (await self._repository.inputs(adapter, record.inputs))[record.row]
        except MissingArtifact:
            # The example may have gone a moment ago, or been moved to another file.
            adapter, now = await self._example(tenant, name, example_id)
            if now.inputs in (None, record.inputs):
                raise
            return adapter, now, (await self._repository.inputs(adapter, now.inputs))[now.row]

    async def _example(self, tenant: str, name: str, example_id: str) -> tuple[AdapterRecord, ExampleRecord]:
        adapter = await self.adapter(tenant, name)
        return adapter, await asyncio.to_thread(self._registry.example, adapter.uid, example_id)
