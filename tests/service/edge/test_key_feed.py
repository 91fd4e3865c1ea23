"""Two processes on one database: what one does to keys, the other hears by polling and in no other way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from sqlalchemy import delete, update

from adapters.cache.aliases import AliasCache
from adapters.cache.feed import ChangeFeed
from adapters.registry.errors import RegistryUnavailable
from adapters.registry.quotas import Quotas
from adapters.registry.registry import Registry
from adapters.registry.schema import changes, keys
from adapters.registry.statements.changes import News, Position
from adapters.registry.tenants import HeldKey
from service.edge.key_cache import KeyCache
from tests.support.adapters.records import append, create

pytestmark = pytest.mark.anyio


class Flaky(Registry):
    """The registry, whose changes can be out of reach while the rest answers."""

    deaf = False

    def changed(self, position: Position | None) -> News:
        if self.deaf:
            raise RegistryUnavailable("out of reach")
        return super().changed(position)


class Process:
    """The caches of a process, whose feed polls when the test says so."""

    def __init__(self, registry: Flaky) -> None:
        self.registry = registry
        self.feed = ChangeFeed(registry, interval=3600.0, deaf_after=60.0)
        self.reads: list[str] = []
        self.now = 1_000.0
        self.keys = KeyCache(self._find, lambda: self.feed.hearing, clock=lambda: self.now)
        self.aliases = AliasCache(registry)
        self.erased: list[tuple[str, str | None]] = []

    async def start(self) -> None:
        await self.feed.start(
            [self.keys, self.aliases], lambda tenant, name: self.erased.append((tenant, name))
        )

    async def close(self) -> None:
        await self.feed.close()
        await self.aliases.close()
        await self.keys.close()

    def _find(self, key_id: str) -> HeldKey | None:
        self.reads.append(key_id)
        return self.registry.tenants.find(key_id)


@pytest.fixture
async def process(registry: Registry, registry_url: str) -> AsyncIterator[Process]:
    opened = Flaky(registry_url)
    process = Process(opened)
    await process.start()
    yield process
    await process.close()
    opened.close()


async def test_what_happens_to_keys_is_heard_by_polling(registry: Registry, process: Process) -> None:
    registry.tenants.create("acme")
    revoked, rotated, kept = (registry.tenants.create_key("acme", ["predict"])[0].id for _ in range(3))
    registry.tenants.create("globex")
    other = registry.tenants.create_key("globex", ["predict"])[0].id
    everyone = (revoked, rotated, kept, other)

    async def in_use() -> set[str]:
        return {key_id for key_id in everyone if await process.keys.get(key_id) is not None}

    assert await in_use() == set(everyone)
    registry.tenants.revoke("acme", revoked)
    await process.feed.poll()
    process.reads.clear()
    assert await in_use() == {rotated, kept, other}
    assert process.reads == [revoked, rotated, kept]

    new = registry.tenants.rotate("acme", rotated, timedelta(0))[0].id
    await process.feed.poll()
    assert await in_use() == {kept, other}
    assert await process.keys.get(new) is not None

    registry.tenants.set_quotas("acme", Quotas(requests_per_second=3.0))
    await process.feed.poll()
    key = await process.keys.get(kept)
    assert key is not None
    assert key.quotas.requests_per_second == 3.0

    # There is no command for it, but the row may say something else when it is read again.
    with registry._database.writing() as connection:
        connection.execute(update(keys).where(keys.c.id == kept).values(scopes="adapt predict"))
    registry.tenants.set_quotas("acme", Quotas())
    await process.feed.poll()
    key = await process.keys.get(kept)
    assert key is not None
    assert key.scopes == {"adapt", "predict"}

    registry.erasures.tenant("acme")
    await process.feed.poll()
    assert await in_use() == {other}
    assert process.erased == [("acme", None)]

    process.reads.clear()
    await process.feed.poll()
    assert await in_use() == {other}
    assert process.reads == []
    assert process.erased == [("acme", None)]


async def test_a_key_revoked_while_changes_are_not_heard_stops(registry: Registry, process: Process) -> None:
    """The database answers, but the poll fails."""
    registry.tenants.create("acme")
    key_id = registry.tenants.create_key("acme", ["predict"])[0].id
    assert await process.keys.get(key_id)
    process.registry.deaf = True
    registry.tenants.revoke("acme", key_id)
    with pytest.raises(RegistryUnavailable):
        await process.feed.poll()
    assert process.feed.hearing
    assert await process.keys.get(key_id)
    # As if no poll had succeeded for some seconds.
    process.feed._deaf_after = 0.0
    process.now += 4.0
    assert await process.keys.get(key_id) is None


async def test_whoever_may_have_missed_changes_forgets_everything(
    registry: Registry, process: Process
) -> None:
    adapter = create(registry).adapter
    key_id = registry.tenants.create_key("acme", ["predict"])[0].id
    await process.feed.poll()
    assert await process.keys.get(key_id)
    await process.aliases.get("acme", "pets")
    process.reads.clear()
    await process.feed.poll()
    assert await process.keys.get(key_id)
    assert (len(process.aliases), process.reads) == (1, [])
    # A restored database has older changes.
    with registry._database.writing() as connection:
        connection.execute(delete(changes))
        connection.execute(update(keys).values(revoked_at=adapter.created_at))
    await process.feed.poll()
    assert len(process.aliases) == 0
    assert await process.keys.get(key_id) is None
    newer = append(registry, adapter, "c")
    assert await process.aliases.get("acme", "pets") == newer.alias
