"""Keys in memory: few reads, and nothing that is revoked for long."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from adapters.registry.errors import RegistryUnavailable
from adapters.registry.tenants import HeldKey
from service.edge import key_cache
from service.edge.key_cache import KeyCache

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Database:
    """Keys that are read, and how often; it can go away, or hang."""

    def __init__(self) -> None:
        self.keys: dict[str, HeldKey] = {}
        self.reads = 0
        self.away = False
        self.running = threading.Event()
        self.running.set()

    def add(self, key_id: str = "one", in_use_for: float | None = None) -> HeldKey:
        self.keys[key_id] = HeldKey(key_id, "acme", frozenset({"predict"}), "", in_use_for)
        return self.keys[key_id]

    def find(self, key_id: str) -> HeldKey | None:
        self.reads += 1
        assert self.running.wait(30)
        if self.away:
            raise RegistryUnavailable("away")
        return self.keys.get(key_id)


@pytest.fixture
def database() -> Iterator[Database]:
    database = Database()
    yield database
    database.running.set()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_cache, "_FRESH_SECONDS", 0.1)
    monkeypatch.setattr(key_cache, "_STALE_SECONDS", 0.2)
    monkeypatch.setattr(key_cache, "_PATIENCE_SECONDS", 0.1)


async def test_many_requests_read_once(database: Database) -> None:
    key = database.add()
    ring = KeyCache(database.find)
    assert await asyncio.gather(*(ring.get("one") for _ in range(50))) == [key] * 50
    assert [await ring.get("nobody") for _ in range(3)] == [None] * 3
    assert database.reads == 2
    await ring.close()


async def test_what_is_revoked_opens_nothing_soon_in_use_or_not() -> None:
    assert key_cache._STALE_SECONDS + key_cache._PATIENCE_SECONDS < 5


async def test_a_key_in_use_is_read_again_beside_its_requests(database: Database, quick: None) -> None:
    database.add()
    ring = KeyCache(database.find)
    assert await ring.get("one")
    await asyncio.sleep(0.12)
    database.running.clear()
    database.add(in_use_for=0.0)
    # No caller waits for the database.
    begin = time.monotonic()
    assert await ring.get("one")
    assert time.monotonic() - begin < 0.05
    database.running.set()
    await asyncio.sleep(0.05)
    assert await ring.get("one") is None
    await ring.close()


async def test_a_key_not_used_for_a_while_is_read_before_it_opens(database: Database, quick: None) -> None:
    database.add()
    ring = KeyCache(database.find)
    assert await ring.get("one")
    del database.keys["one"]
    await asyncio.sleep(0.25)
    assert await ring.get("one") is None
    await ring.close()


async def test_a_key_expires_while_it_is_known(database: Database) -> None:
    database.add(in_use_for=0.1)
    ring = KeyCache(database.find)
    assert await ring.get("one")
    await asyncio.sleep(0.12)
    assert await ring.get("one") is None
    assert database.reads == 1
    await ring.close()


@pytest.mark.parametrize("hangs", [False, True])
async def test_without_its_database_known_keys_go_on(database: Database, quick: None, hangs: bool) -> None:
    key = database.add()
    ring = KeyCache(database.find)
    await ring.get("one")
    if hangs:
        database.running.clear()
    database.away = True
    await asyncio.sleep(0.25)
    begin = time.monotonic()
    for _ in range(20):
        assert await ring.get("one") == key
    assert time.monotonic() - begin < 0.2
    database.running.set()
    with pytest.raises(RegistryUnavailable):
        await ring.get("two")
    database.away = False
    del database.keys["one"]
    await asyncio.sleep(0.25)
    assert await ring.get("one") is None
    await ring.close()


async def test_what_is_remembered_is_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_cache, "_MOST", 10)
    ring = KeyCache(database.find)
    for number in range(100):
        assert await ring.get(str(number)) is None
    assert len(ring._known) == 10
    await ring.close()


async def test_closing_waits_for_readers(database: Database) -> None:
    ring = KeyCache(database.find)
    database.running.clear()
    asking = asyncio.create_task(ring.get("one"))
    await asyncio.sleep(0.05)
    asking.cancel()
    closing = asyncio.create_task(ring.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    database.running.set()
    await asyncio.wait_for(closing, 10)
