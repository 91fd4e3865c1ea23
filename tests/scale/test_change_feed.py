"""What a process reads of the database for itself, once or twice a second, whatever the others do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from adapters.registry.registry import Registry
from service.edge.key_cache import KeyCache
from tests.support.adapters.crowd import Cost, cost, populate
from tests.support.conditions import eventually
from tests.support.storage import new_schema

TENANTS = 1_000
SPREAD = 3  # pages: trees of indexes get a level more, and a page is split


@pytest.fixture(scope="module")
def registry(postgres_server: str) -> Iterator[Registry]:
    url = new_schema(postgres_server)
    populate(url, TENANTS)
    registry = Registry(url)
    yield registry
    registry.close()


def change(registry: Registry, count: int) -> None:
    """As if other processes had committed to `count` adapters in the last ten seconds."""
    with registry._database.writing() as connection:
        connection.execute(
            text(
                """INSERT INTO changes (tenant, name, at, gone)
                   SELECT 't' || 1 + n % :tenants, 'pets', now() - 10 * random() * interval '1 second', false
                   FROM generate_series(1, :count) AS numbers (n)"""
            ),
            {"tenants": TENANTS, "count": count},
        )


def test_an_idle_poll_costs_the_same_however_much_has_just_changed(
    postgres_server: str, registry: Registry
) -> None:
    def idle() -> Cost:
        position = registry.changed(None).position
        registry.changed(position)
        with cost(postgres_server) as counted:
            assert registry.changed(position).changes == ()
        return counted

    change(registry, 1)
    quiet = idle()
    change(registry, 5_000)
    busy = idle()
    with cost(postgres_server) as least, registry._database.reading() as connection:
        connection.execute(text("SELECT 1"))
    assert quiet.statements == busy.statements == least.statements
    assert busy.pages <= quiet.pages + SPREAD, busy.slowest
    assert busy.pages <= 20, busy.slowest


def test_a_poll_reads_each_change_once(postgres_server: str, registry: Registry) -> None:
    change(registry, 5_000)
    position = registry.changed(None).position
    change(registry, 10)
    with cost(postgres_server) as first:
        news = registry.changed(position)
    with cost(postgres_server) as second:
        assert registry.changed(news.position).changes == ()
    assert len(news.changes) == 10
    assert second.pages < first.pages / 2


def test_a_key_in_use_is_read_about_once_a_minute(postgres_server: str, registry: Registry) -> None:
    keys = [f"{number:016x}" for number in range(1, 301)]
    registry.tenants.find(keys[0])
    with cost(postgres_server) as one:
        registry.tenants.find(keys[0])
    now = 1_000.0

    async def scenario() -> None:
        nonlocal now
        ring = KeyCache(registry.tenants.find, lambda: True, clock=lambda: now)
        for _ in range(2):
            with cost(postgres_server) as counted:
                for _ in range(60):
                    for key_id in keys:
                        assert await ring.get(key_id) is not None
                    # Those in the background too.
                    await eventually(lambda: not ring._flights._tasks)
                    now += 1.0
            reads = counted.statements / one.statements
            assert len(keys) <= reads <= 1.05 * len(keys)
        await ring.close()

    asyncio.run(scenario())
