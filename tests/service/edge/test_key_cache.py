"""Keys in memory: few reads, and nothing that is revoked for long."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from adapters.cache import feed
from adapters.registry.errors import RegistryUnavailable
from adapters.registry.records import Changed
from adapters.registry.tenants import HeldKey
from service.edge import key_cache
from service.edge.key_cache import KeyCache
from tests.support.conditions import eventually

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

    def add(self, key_id: str = "one", in_use_for: float | None = None, tenant: str = "acme") -> HeldKey:
        self.keys[key_id] = HeldKey(key_id, tenant, frozenset({"predict"}), "", in_use_for)
        return self.keys[key_id]

    def find(self, key_id: str) -> HeldKey | None:
        self.reads += 1
        found = self.keys.get(key_id)
        assert self.running.wait(30)
        if self.away:
            raise RegistryUnavailable("away")
        return found


@pytest.fixture
def database() -> Iterator[Database]:
    database = Database()
    yield database
    database.running.set()


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Ears:
    """Whether changes are heard."""

    hearing = True

    def __call__(self) -> bool:
        return self.hearing


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_many_requests_read_once(database: Database) -> None:
    key = database.add()
    ring = KeyCache(database.find)
    assert await asyncio.gather(*(ring.get("one") for _ in range(50))) == [key] * 50
    assert [await ring.get("nobody") for _ in range(3)] == [None] * 3
    assert database.reads == 2
    await ring.close()


async def test_what_is_revoked_opens_nothing_soon_in_use_or_not() -> None:
    """If changes cannot be heard, known keys are read again soon enough after the last that was heard."""
    assert key_cache._DEAF.stale + key_cache._PATIENCE_SECONDS < 5
    assert feed._DEAF_SECONDS + key_cache._PATIENCE_SECONDS < 5


@pytest.mark.parametrize(("hearing", "fresh"), [(True, 60.0), (False, 2.0)])
async def test_a_key_in_use_is_read_again_beside_its_requests(
    database: Database, clock: Clock, hearing: bool, fresh: float
) -> None:
    database.add()
    ring = KeyCache(database.find, lambda: hearing, clock=clock)
    assert await ring.get("one")
    clock.now += fresh - 0.1
    assert await ring.get("one")
    assert database.reads == 1
    clock.now += 0.2
    database.running.clear()
    database.add(in_use_for=0.0)
    # No caller waits for the database.
    assert await asyncio.wait_for(ring.get("one"), 0.1)
    await eventually(lambda: database.reads == 2)
    database.running.set()
    await eventually(lambda: ring._known["one"].at == clock.now)
    assert await ring.get("one") is None
    await ring.close()


@pytest.mark.parametrize(("hearing", "stale"), [(True, 120.0), (False, 4.0)])
async def test_a_key_not_used_for_a_while_is_read_before_it_opens(
    database: Database, clock: Clock, hearing: bool, stale: float
) -> None:
    database.add()
    ring = KeyCache(database.find, lambda: hearing, clock=clock)
    assert await ring.get("one")
    del database.keys["one"]
    clock.now += stale
    assert await ring.get("one") is None
    await ring.close()


async def test_a_key_is_read_soon_once_changes_are_not_heard_any_more(
    database: Database, clock: Clock
) -> None:
    database.add()
    ears = Ears()
    ring = KeyCache(database.find, ears, clock=clock)
    assert await ring.get("one")
    clock.now += 30.0
    assert await ring.get("one")
    del database.keys["one"]
    ears.hearing = False
    assert await ring.get("one") is None
    await ring.close()


async def test_a_key_expires_while_it_is_known(database: Database, clock: Clock) -> None:
    database.add(in_use_for=30.0)
    ring = KeyCache(database.find, Ears(), clock=clock)
    assert await ring.get("one")
    clock.now += 30.0
    assert await ring.get("one") is None
    assert database.reads == 1
    await ring.close()


@pytest.mark.parametrize("hangs", [False, True])
async def test_without_its_database_known_keys_go_on(database: Database, clock: Clock, hangs: bool) -> None:
    key = database.add()
    ears = Ears()
    ring = KeyCache(database.find, ears, patience=0.1, clock=clock)
    await ring.get("one")
    if hangs:
        database.running.clear()
    database.away = True
    ears.hearing = False
    for _ in range(3):
        clock.now += 5.0
        begin = time.monotonic()
        for _ in range(20):
            assert await ring.get("one") == key
        # One of them has waited.
        assert time.monotonic() - begin < 0.5
    database.running.set()
    with pytest.raises(RegistryUnavailable):
        await ring.get("two")
    database.away = False
    ears.hearing = True
    assert await ring.get("one") == key
    del database.keys["one"]
    clock.now += 120.0
    async with asyncio.timeout(30.0):
        # It may wait for a read that began before the change.
        while await ring.get("one") is not None:
            clock.now += 120.0
    await ring.close()


@pytest.mark.parametrize("known", [False, True])
async def test_a_read_from_before_a_change_is_not_kept(database: Database, clock: Clock, known: bool) -> None:
    """It may have begun before the key was revoked, and it ends after that was heard."""
    database.add()
    database.add("two", tenant="globex")
    ring = KeyCache(database.find, Ears(), clock=clock)
    for key_id in ("one", "two")[not known :]:
        await ring.get(key_id)
    clock.now += 60.0
    database.reads = 0
    database.running.clear()
    reading = [asyncio.create_task(ring.get(key_id)) for key_id in ("one", "two")]
    await eventually(lambda: database.reads == 2)
    database.add(in_use_for=0.0)
    ring.heard(Changed("acme", "", None, None))
    database.running.set()
    await asyncio.gather(*reading)
    await eventually(lambda: not ring._flights._tasks)
    assert await ring.get("one") is None
    # Those of another tenant are kept.
    reads = database.reads
    assert await ring.get("two")
    assert database.reads == reads
    await ring.close()


async def test_a_key_that_changes_while_the_database_hangs_does_not_go_on(
    database: Database, clock: Clock
) -> None:
    database.add()
    ears = Ears()
    ring = KeyCache(database.find, ears, patience=0.2, clock=clock)
    await ring.get("one")
    clock.now += 5.0
    ears.hearing = False
    database.running.clear()
    asking = asyncio.create_task(ring.get("one"))
    await eventually(lambda: database.reads == 2)
    database.add(in_use_for=0.0)
    ring.heard(Changed("acme", "", None, None))
    await eventually(lambda: database.reads == 3)
    database.running.set()
    assert await asking is None
    assert await ring.get("one") is None
    await ring.close()


async def test_only_changed_keys_are_forgotten(database: Database) -> None:
    database.add()
    database.add("two", tenant="globex")
    ring = KeyCache(database.find, Ears())

    async def reads() -> int:
        before = database.reads
        await asyncio.gather(*(ring.get(key_id) for key_id in ("one", "two")))
        return database.reads - before

    assert await reads() == 2
    ring.heard(Changed("acme", "pets", None, None, gone=True))
    assert await reads() == 0
    ring.heard(Changed("acme", "", None, None))
    assert await reads() == 1
    ring.heard(Changed("globex", "", None, None, gone=True))
    assert await reads() == 1
    ring.heard(Changed("", "", None, None))
    assert await reads() == 2
    ring.clear()
    assert await reads() == 2
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
