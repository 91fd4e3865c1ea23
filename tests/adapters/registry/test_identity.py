"""A database and its store know each other, and take no other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.maintenance.backup import backup
from adapters.maintenance.restore import restore
from adapters.maintenance.table_copy import references
from adapters.registry.identity import Identity, WrongStore
from adapters.registry.registry import Registry
from adapters.storage.artifact import Store
from adapters.storage.local import LocalStore
from adapters.storage.open import open_store
from tests.support.adapters.adapter_stack import TENANT, taught
from tests.support.adapters.storage_places import WHERE, Make, Place, Where

pytestmark = pytest.mark.anyio


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Registry]:
    opened = Registry(f"sqlite:///{tmp_path / 'other.db'}")
    opened.migrate()
    yield opened
    opened.close()


def test_an_empty_store_becomes_the_databases(registry: Registry, other: Registry, store: Store) -> None:
    assert store.identity() is None
    registry.identity.check(store)
    assert store.identity() == registry.identity.name != other.identity.name
    registry.identity.check(store)
    with pytest.raises(WrongStore, match="belongs to another database"):
        other.identity.check(store)
    assert store.identity() == registry.identity.name


def test_a_store_is_claimed_once(store: Store) -> None:
    store.claim("a" * 32)
    store.claim("b" * 32)
    assert store.identity() == "a" * 32
    assert list(store.objects()) == []


def test_processes_of_one_database_claim_its_store_at_once(tmp_path: Path) -> None:
    def claim(store: LocalStore) -> None:
        together.wait(30)
        store.claim("a" * 32)

    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            stores = [LocalStore(tmp_path / str(number)) for _ in range(8)]
            together = threading.Barrier(len(stores))
            list(pool.map(claim, stores))
            assert {store.identity() for store in stores} == {"a" * 32}


def test_a_database_tells_its_age(registry: Registry) -> None:
    assert -5.0 < registry.identity.age < 60.0


async def test_a_store_from_before_identities_goes_to_the_database_that_knows_it(
    place: Place, other: Registry
) -> None:
    async with place.world() as world:
        await world.adapt(taught())
    with pytest.raises(WrongStore, match="knows none of them"):
        other.identity.check(place.store)
    assert place.store.identity() is None
    Identity(place.database).check(place.store)
    assert place.store.identity() == Identity(place.database).name


async def test_a_store_of_which_all_is_erased_is_still_its_databases(place: Place) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        uid = world.registry.adapter(TENANT, "words").uid
        await world.eraser.adapter(TENANT, "words")
        await world.repository.publish(TENANT, uid, [lambda: b"what a killed process left"])
    Identity(place.database).check(place.store)


@pytest.mark.parametrize("to", WHERE)
async def test_a_restore_into_a_new_database_takes_the_lost_ones_store(
    place: Place, make: Make, to: Where, tmp_path: Path
) -> None:
    async with place.world() as world:
        await world.adapt(taught())
    lost = Identity(place.database)
    lost.check(place.store)
    path, _ = backup(place.database, place.store, tmp_path / "backups")

    fresh = make(to, "fresh")
    assert Identity(fresh.database).name != lost.name
    restore(path, fresh.database, place.store)
    assert Identity(fresh.database).name == lost.name
    Identity(fresh.database).check(place.store)

    apart = make(to, "apart")
    restore(path, apart.database, apart.store)
    assert Identity(apart.database).name not in (lost.name, None)
    assert apart.store.identity() == Identity(apart.database).name


async def test_a_restore_refuses_the_store_of_a_third_database(
    place: Place, make: Make, other: Registry, tmp_path: Path
) -> None:
    async with place.world() as world:
        await world.adapt(taught())
    path, _ = backup(place.database, place.store, tmp_path / "backups")
    target = make("local", "target")
    other.identity.check(target.store)
    with pytest.raises(WrongStore):
        restore(path, target.database, target.store)
    with target.database.reading() as connection:
        assert references(connection) == []
    assert list(target.store.objects()) == []


def test_the_identity_is_a_file_of_the_owners_alone(tmp_path: Path) -> None:
    open_store(str(tmp_path / "artifacts")).claim("a" * 32)
    path = tmp_path / "artifacts" / "identity"
    assert path.read_text() == "a" * 32 + "\n"
    assert path.stat().st_mode & 0o077 == 0
    assert [one.name for one in path.parent.iterdir()] == ["identity"]
