"""Sweeps: what they delete, what they spare, and what may return."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from adapters.storage.artifact import PARTIAL, Artifact, MissingArtifact, Store, StoredObject
from adapters.storage.open import open_store
from adapters.storage.sweeper import Swept, orphans, sweep

TENANT = "acme"
UID = "0" * 31 + "1"
OTHER = "0" * 31 + "2"


@dataclass
class Rows:
    """The answers of a database."""

    held: dict[str, set[Artifact]] = field(default_factory=dict)
    erased: dict[str, float] = field(default_factory=dict)

    asked: list[int] = field(default_factory=list)  # numbers of adapters, by query

    def referenced(self, *uids: str) -> set[Artifact]:
        self.asked.append(len(uids))
        return set().union(*(self.held.get(uid, set()) for uid in uids))

    def erased_ago(self, *uids: str) -> dict[str, float]:
        self.asked.append(len(uids))
        return {uid: self.erased[uid] for uid in uids if uid in self.erased}


def names(store: Store, *, aside: bool = False) -> set[str]:
    return {found.name for found in store.objects(aside=aside)}


def test_old_orphans_are_put_aside_and_deleted_later(store: Store) -> None:
    kept, orphan = store.publish_all(TENANT, UID, [b"kept", b"orphan"])
    lost = store.publish(TENANT, OTHER, b"of no adapter")
    rows = Rows({UID: {kept}})
    assert sweep(store, rows, older_than=60.0) == Swept()
    assert names(store) == {kept.name, orphan.name, lost.name}
    assert sweep(store, rows, older_than=-60.0) == Swept(aside=2)
    assert (names(store), names(store, aside=True)) == ({kept.name}, {orphan.name, lost.name})
    with pytest.raises(MissingArtifact):
        store.read(TENANT, UID, orphan)
    assert sweep(store, rows) == Swept()
    assert sweep(store, rows, kept_aside=-60.0) == Swept(deleted=2)
    assert names(store, aside=True) == set()
    assert store.read(TENANT, UID, kept) == b"kept"


def test_what_has_a_row_after_all_comes_back(store: Store) -> None:
    """A database that is not the store's swept it; then the right one starts."""
    mine = store.publish_all(TENANT, UID, [b"head", b"evidence"])
    assert sweep(store, Rows(), older_than=-60.0) == Swept(aside=2)
    assert sweep(store, Rows({UID: set(mine)}), kept_aside=-60.0) == Swept(brought_back=2)
    assert [store.read(TENANT, UID, one) for one in mine] == [b"head", b"evidence"]
    assert names(store, aside=True) == set()


def test_a_sweep_takes_few_at_once_and_the_oldest_first(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    found = store.publish_all(TENANT, UID, [bytes([number]) for number in range(50)])
    for number, artifact in enumerate(found):
        os.utime(tmp_path / TENANT / UID / artifact.name, (number, number))
    assert sweep(store, Rows()) == Swept(aside=20, spared=30)
    assert names(store, aside=True) == {artifact.name for artifact in found[:20]}
    assert sweep(store, Rows()) == Swept(aside=20, spared=10)
    assert sweep(store, Rows()) == Swept(aside=10)


def test_a_twentieth_of_many_is_few(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    held = set(store.publish_all(TENANT, UID, [b"%d" % number for number in range(560)]))
    store.publish_all(TENANT, OTHER, [b"%d" % number for number in range(40)])
    assert sweep(store, Rows({UID: held}), older_than=-60.0) == Swept(aside=30, spared=10)


def test_what_may_hold_something_erased_is_not_kept_aside(store: Store) -> None:
    store.publish_all(TENANT, UID, [b"from before the erasure"])
    store.publish_all(TENANT, OTHER, [b"from after it"])
    # Ages by a bucket's whole seconds may be negative.
    rows = Rows(erased={UID: -60.0, OTHER: 3_600.0})
    assert sweep(store, rows, older_than=-60.0) == Swept(aside=1, deleted=1)
    assert {found.adapter_uid for found in store.objects(aside=True)} == {OTHER}


def test_what_was_interrupted_is_deleted_at_once(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    whole = store.publish(TENANT, UID, b"whole")
    partial = tmp_path / TENANT / UID / (whole.name + PARTIAL)
    partial.write_bytes(b"wh")
    assert sweep(store, Rows({UID: {whole}}), older_than=-60.0) == Swept(deleted=1)
    assert not partial.exists()


@pytest.mark.parametrize("whole", [False, True])
def test_erasures_reach_what_was_put_aside(store: Store, whole: bool) -> None:
    store.publish_all(TENANT, UID, [b"a"])
    kept = store.publish("acme-2", UID, b"b")
    assert sweep(store, Rows(), older_than=-60.0) == Swept(aside=2)
    if whole:
        store.delete_tenant(TENANT)
    else:
        store.delete_adapter(TENANT, UID)
    assert names(store, aside=True) == {kept.name}


def test_the_rows_of_a_thousand_adapters_are_read_at_once(tmp_path: Path) -> None:
    for number in range(2_500):
        folder = tmp_path / TENANT / f"{number:032x}"
        folder.mkdir(parents=True)
        (folder / f"{number:064x}-{0:016x}").touch()
    store = open_store(str(tmp_path))
    left = Artifact(f"{2_400:064x}", 0, f"{0:016x}")
    rows = Rows({f"{number:032x}": {replace(left, sha256=f"{number:064x}")} for number in range(2_400)})
    assert sweep(store, rows, older_than=-60.0) == Swept(aside=100)
    # The last query is for what was erased of the adapters of the hundred.
    assert sorted(rows.asked) == [100, 500, 1_000, 1_000]


def test_many_objects_of_few_adapters_are_compared_in_parts() -> None:
    rows = Rows()
    found = (
        StoredObject(TENANT, f"{number // 30_000:032x}", f"{number:064x}-{0:016x}", 60.0)
        for number in range(120_000)
    )
    assert sum(map(len, orphans(found, rows.referenced, 0.0))) == 120_000
    assert rows.asked == [2, 2]


def test_orphans_are_listed_by_adapter(store: Store) -> None:
    store.publish_all(TENANT, UID, [b"a", b"b"])
    store.publish(TENANT, OTHER, b"c")
    found = list(orphans(store.objects(), Rows().referenced, -60.0))
    assert sorted(len(group) for group in found) == [1, 2]
    assert list(orphans(store.objects(), Rows().referenced, 60.0)) == []
