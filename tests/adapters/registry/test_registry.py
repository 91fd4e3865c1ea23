from __future__ import annotations

import multiprocessing
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text

from adapters.examples.target import Target, Task
from adapters.registry.database import Database
from adapters.registry.errors import (
    KEPT_VERSIONS,
    AdapterExists,
    AliasMoved,
    RegistryUnavailable,
    RevisionMoved,
    UnknownAdapter,
    UnknownExample,
    UnknownVersion,
)
from adapters.registry.records import Change, Committed, ExampleWrite, NewVersion, Rebase, Repoint
from adapters.registry.registry import Registry, new_uid
from adapters.registry.sqlite import wal_is_safe
from adapters.storage.artifact import StoreFull
from adapters.storage.local import LocalStore
from tests.support.adapters.records import TEXTS, append, artifact, change, create, example, refit, version


def test_creates_an_adapter_with_its_first_version(registry: Registry) -> None:
    committed = create(registry)
    adapter = committed.adapter
    assert (adapter.revision, adapter.live, adapter.examples) == (1, 1, 2)
    assert (adapter.backbone, adapter.kind, adapter.task, adapter.keep_inputs) == (
        "minilm-l6-v2",
        "text",
        "classification",
        True,
    )
    assert (committed.added, committed.replaced, committed.removed) == (2, 0, 0)
    assert committed.unreferenced == ()
    assert committed.gone == ()
    assert committed.version is not None
    assert (committed.version.number, committed.version.revision, committed.version.labels) == (1, 1, 2)
    assert committed.version.report == {"accuracy": 0.5}
    assert committed.alias.version == 1
    assert committed.alias.artifact == committed.version.artifact
    assert registry.adapter("acme", "pets") == adapter
    assert registry.version(adapter.uid, 1) == committed.version
    assert registry.resolve("acme", "pets") == committed.alias


def test_embeddings_are_found_by_tenant_and_backbone(registry: Registry) -> None:
    own = {create(registry, name).adapter.uid for name in ("pets", "cars")}
    create(registry, tenant="umbrella")
    known = "d" * 64
    found = registry.places_of("acme", TEXTS.fingerprint, [known, "e" * 64])
    assert set(found) == {known}
    uid, segment, row = found[known]
    assert uid in own
    assert (segment.sha256, row) in {(artifact("segment").sha256, 0), (artifact("segment").sha256, 1)}
    assert registry.places_of("acme", "0" * 64, [known]) == {}
    assert registry.places_of("nobody", TEXTS.fingerprint, [known]) == {}
    # More than one statement takes.
    assert registry.places_of("acme", TEXTS.fingerprint, [f"{n:064x}" for n in range(70_000)]) == {}


def test_times_are_the_databases_and_utc(registry: Registry) -> None:
    created = create(registry).adapter.created_at
    assert created.tzinfo is UTC
    assert abs(datetime.now(UTC) - created) < timedelta(minutes=1)
    uid = registry.adapter("acme", "pets").uid
    assert registry.version(uid, 1).created_at.tzinfo is UTC
    assert registry.example(uid, "a").created_at.tzinfo is UTC


def test_examples_read_back_as_they_were_written(registry: Registry) -> None:
    segment, inputs = artifact("segment"), artifact("inputs")
    cases: tuple[tuple[Task, list[Target]], ...] = (
        ("classification", ["cat", 'quo"te', "ünï\u202fcode 🐱"]),
        ("multilabel", [("a", "b"), (), ("c",)]),
        ("regression", [0.1, -1e300, 3.0]),
    )
    for task, targets in cases:
        uid = new_uid()
        upserts = tuple(
            ExampleWrite(f"e{row}", "d" * 64, target, segment, row, inputs if row else None)
            for row, target in enumerate(targets)
        )
        registry.commit(Change("acme", task, uid, 0, create=replace(TEXTS, task=task), upserts=upserts))
        revision, found = registry.all_examples(uid)
        assert revision == 1
        assert [(e.id, e.digest, e.target, e.segment, e.row, e.inputs) for e in found] == [
            (e.id, e.digest, e.target, e.segment, e.row, e.inputs) for e in upserts
        ]


def test_pages_examples_and_adapters_by_code_point(registry: Registry) -> None:
    ids = ["Z", "a", "a b", "a-b", "ab", "é", "日", "10", "9"]
    uid = create(registry, ids=ids).adapter.uid
    pages, after = [], None
    while page := registry.examples(uid, after, limit=2):
        pages += [found.id for found in page]
        after = page[-1].id
    assert pages == sorted(ids) == [found.id for found in registry.all_examples(uid)[1]]
    names = ["b", "a-b", "a.b", "a0"]
    for name in names:
        create(registry, name, tenant="names")
    assert [found.name for found in registry.adapters("names")] == sorted(names)
    assert [found.name for found in registry.adapters("names", after="a-b", limit=2)] == ["a.b", "a0"]


def test_an_unknown_adapter_and_another_tenants_are_the_same_error(registry: Registry) -> None:
    uid = create(registry).adapter.uid
    for call in (
        lambda tenant, name: registry.adapter(tenant, name),
        lambda tenant, name: registry.resolve(tenant, name),
        lambda tenant, name: registry.resolve(tenant, name, 1),
        lambda tenant, name: registry.delete_adapter(tenant, name),
        lambda tenant, name: registry.commit(Change(tenant, name, uid, 1, version=version())),
    ):
        errors = []
        for tenant in ("nobody", "other"):
            if tenant == "nobody":
                create(registry, "pets", tenant="third")
            with pytest.raises(UnknownAdapter) as caught:
                call(tenant, "pets")
            errors.append((type(caught.value), caught.value.code, str(caught.value)))
            if tenant == "nobody":
                registry.delete_adapter("third", "pets")
        assert errors[0] == errors[1]
    assert registry.adapters("other") == []


def test_replaces_by_id_and_keeps_the_count(registry: Registry) -> None:
    first = create(registry)
    segment = artifact("new")
    committed = registry.commit(
        replace(change(first.adapter), upserts=(example("b", segment, 0), example("c", segment, 1)))
    )
    assert (committed.added, committed.replaced, committed.adapter.examples) == (1, 1, 3)
    assert committed.adapter.revision == 2
    assert committed.adapter.live == 1
    assert committed.version is None
    assert registry.example(first.adapter.uid, "b").segment == segment
    assert committed.unreferenced == ()


def test_update_replace_forgets_the_rest_but_keeps_the_versions(registry: Registry) -> None:
    first = create(registry, ids=("a", "b", "c"))
    old = registry.example(first.adapter.uid, "a")
    segment = artifact("new")
    committed = registry.commit(
        replace(
            change(first.adapter),
            clear_first=True,
            upserts=(example("b", segment, 0), example("d", segment, 1)),
            version=version(),
            promote=True,
        )
    )
    assert (committed.added, committed.replaced, committed.removed, committed.adapter.examples) == (
        1,
        1,
        2,
        2,
    )
    assert [found.id for found in registry.all_examples(first.adapter.uid)[1]] == ["b", "d"]
    assert set(committed.unreferenced) == {old.segment, old.inputs}
    assert [found.number for found in registry.versions(first.adapter.uid)] == [2, 1]
    emptied = registry.commit(replace(change(committed.adapter), clear_first=True))
    assert (emptied.removed, emptied.adapter.examples, emptied.adapter.live) == (2, 0, 2)


def test_a_removal_takes_the_versions_that_learned_from_it_and_all_its_bytes(registry: Registry) -> None:
    first = create(registry, ids=("a", "b"))
    uid = first.adapter.uid
    second = append(registry, first.adapter, "c", "d")
    third = refit(registry, second.adapter)
    assert second.version is not None
    assert third.version is not None
    assert third.adapter.live == 3
    c = registry.example(uid, "c")
    rewritten = artifact("rewritten")
    committed = registry.commit(
        replace(
            change(third.adapter),
            removals=("c",),
            repoints=(Repoint("d", rewritten, 0),),
            version=version(),
            promote=True,
        )
    )
    assert committed.gone == (2, 3)
    assert committed.removed == 1
    assert [found.number for found in registry.versions(uid)] == [4, 1]
    assert set(committed.unreferenced) == {c.segment, second.version.artifact, third.version.artifact}
    d = registry.example(uid, "d")
    assert (d.segment, d.row) == (rewritten, 0)
    with pytest.raises(UnknownExample):
        registry.example(uid, "c")
    stored = registry.referenced(uid)
    assert not stored & set(committed.unreferenced)
    assert rewritten in stored


def test_a_versions_network_is_kept_as_long_as_the_version(registry: Registry) -> None:
    first = create(registry, ids=("a",))
    uid = first.adapter.uid
    assert first.version is not None
    assert first.version.network is None
    assert first.alias.network is None
    network = artifact("network")
    tuned = registry.commit(replace(change(first.adapter), version=version(network=network), promote=True))
    assert tuned.version is not None
    assert tuned.version.network == network
    assert registry.version(uid, 2) == tuned.version
    assert tuned.alias.network == registry.resolve("acme", "pets", 2).network == network
    assert registry.resolve("acme", "pets", 1).network is None
    assert network in registry.referenced(uid)
    again = registry.commit(
        replace(
            change(tuned.adapter), upserts=(example("b", artifact("b")),), version=version(network=network)
        )
    )
    assert again.alias.network == network
    assert registry.promote(uid, 1).alias.network is None
    fewer = registry.commit(replace(change(again.adapter), removals=("b",)))
    assert fewer.gone == (3,)
    assert network not in fewer.unreferenced
    assert registry.version(uid, 2).network == network
    emptied = registry.commit(replace(change(fewer.adapter), removals=("a",)))
    assert emptied.gone == (1, 2)
    assert network in emptied.unreferenced
    assert registry.referenced(uid) == set()


def test_where_the_live_version_goes_and_the_new_one_is_withheld_another_follows(registry: Registry) -> None:
    first = create(registry, ids=("a",))
    second = append(registry, first.adapter, "b")
    third = append(registry, second.adapter, "c")
    uid = third.adapter.uid
    staying = registry.versions_without(uid, ["c", "b"])
    assert [one.number for one in staying] == [1]
    assert [one.number for one in registry.versions_without(uid, ["c"])] == [2, 1]
    moved = replace(change(third.adapter), removals=("b", "c"), version=version())
    with pytest.raises(RevisionMoved):
        registry.commit(replace(moved, fallback=2))
    with pytest.raises(ValueError, match="two versions"):
        registry.commit(replace(moved, fallback=1, promote=True))
    done = registry.commit(replace(moved, fallback=1))
    assert (done.adapter.live, done.alias.version, done.gone) == (1, 1, (2, 3))


def test_a_removal_with_nothing_left_to_fit_leaves_nothing_live(registry: Registry) -> None:
    first = create(registry, ids=("a",))
    committed = registry.commit(replace(change(first.adapter), removals=("a",)))
    assert committed.adapter.live is None
    assert committed.adapter.examples == 0
    assert committed.gone == (1,)
    assert committed.alias.version is None
    assert committed.alias.artifact is None
    assert committed.alias.fingerprint == "f" * 64
    assert registry.referenced(first.adapter.uid) == set()
    assert len(committed.unreferenced) == 4
    after = append(registry, committed.adapter, "x", "y")
    assert after.version is not None
    assert after.version.number == 2


def test_an_id_that_was_corrected_is_remembered_since_it_first_came(registry: Registry) -> None:
    first = create(registry, ids=("a", "b"))
    corrected = append(registry, first.adapter, "a")
    replaced = registry.commit(
        replace(change(corrected.adapter), clear_first=True, upserts=(example("a", artifact("third")),))
    )
    committed = registry.commit(replace(change(replaced.adapter), removals=("a",)))
    assert committed.gone == (1, 2)


def test_a_removal_that_would_leave_the_bytes_is_refused(registry: Registry) -> None:
    first = create(registry, ids=("a", "b"))
    uid = first.adapter.uid
    with pytest.raises(ValueError, match="repoint"):
        registry.commit(replace(change(first.adapter), removals=("a",)))
    rewritten = artifact("rewritten")
    b = registry.example(uid, "b")
    with pytest.raises(ValueError, match="repoint"):
        registry.commit(
            replace(change(first.adapter), removals=("a",), repoints=(Repoint("b", rewritten, 1, b.inputs),))
        )
    assert registry.adapter("acme", "pets") == first.adapter
    assert registry.all_examples(uid)[0] == 1
    assert rewritten not in registry.referenced(uid)


def test_a_place_that_two_examples_share_stays_when_one_is_removed(registry: Registry) -> None:
    first = create(registry, ids=("a",))
    a = registry.example(first.adapter.uid, "a")
    twin = registry.commit(
        replace(change(first.adapter), upserts=(example("twin", a.segment, a.row, a.inputs),))
    )
    committed = registry.commit(replace(change(twin.adapter), removals=("a",)))
    assert a.segment not in committed.unreferenced
    assert registry.example(first.adapter.uid, "twin").inputs == a.inputs


def test_unknown_ids_change_nothing(registry: Registry) -> None:
    first = create(registry)
    for wrong in (
        replace(change(first.adapter), removals=("nope",), version=version()),
        replace(change(first.adapter), repoints=(Repoint("nope", artifact(), 0),)),
    ):
        with pytest.raises(UnknownExample):
            registry.commit(wrong)
    assert registry.adapter("acme", "pets") == first.adapter


@pytest.mark.parametrize(
    "wrong",
    [
        {"upserts": (example("x", artifact()), example("x", artifact()))},
        {"upserts": (example("a", artifact()),), "removals": ("a",)},
        {"removals": ("a", "a")},
        {"clear_first": True, "removals": ("a",)},
        {"promote": True},
    ],
)
def test_a_change_that_contradicts_itself_is_refused(registry: Registry, wrong: dict[str, object]) -> None:
    first = create(registry)
    with pytest.raises(ValueError, match=r"change|clear_first|no version"):
        registry.commit(replace(change(first.adapter), **wrong))  # type: ignore[arg-type]
    assert registry.adapter("acme", "pets") == first.adapter


def test_a_moved_revision_is_refused(registry: Registry) -> None:
    first = create(registry)
    append(registry, first.adapter, "c")
    with pytest.raises(RevisionMoved):
        append(registry, first.adapter, "d")
    with pytest.raises(AdapterExists):
        create(registry)
    registry.delete_adapter("acme", "pets")
    again = create(registry)
    assert again.adapter.revision == first.adapter.revision
    assert again.adapter.uid != first.adapter.uid
    with pytest.raises(RevisionMoved):
        append(registry, first.adapter, "d")
    assert [found.id for found in registry.all_examples(again.adapter.uid)[1]] == ["a", "b"]


def test_refitting_moves_the_epoch_and_not_the_revision(registry: Registry) -> None:
    first = create(registry)
    second = refit(registry, first.adapter, promote=False)
    assert second.adapter.revision == first.adapter.revision
    assert second.adapter.epoch > first.adapter.epoch
    assert second.adapter.live == 1
    assert second.alias.version == 1
    assert second.version is not None
    assert second.version.number == 2


def test_epochs_grow_over_deletion_and_recreation(registry: Registry) -> None:
    epochs = [create(registry).adapter.epoch]
    registry.delete_adapter("acme", "pets")
    epochs.append(create(registry).adapter.epoch)
    epochs.append(append(registry, registry.adapter("acme", "pets"), "z").adapter.epoch)
    epochs.append(create(registry, "other").adapter.epoch)
    assert epochs == sorted(set(epochs))


def test_keeps_the_newest_versions_and_the_live_one_and_never_reuses_a_number(registry: Registry) -> None:
    first = create(registry)
    uid = first.adapter.uid
    for number in range(2, KEPT_VERSIONS + 3):
        committed = refit(registry, first.adapter, promote=False)
        assert committed.version is not None
        assert committed.version.number == number
    newest = KEPT_VERSIONS + 2
    assert [found.number for found in registry.versions(uid)] == [*range(newest, 2, -1), 1]
    promoted = registry.promote(uid, newest)
    assert promoted.gone == (1,)
    assert first.version is not None
    assert set(promoted.unreferenced) == {first.version.artifact, first.version.evidence}
    with pytest.raises(UnknownVersion):
        registry.version(uid, 1)
    emptied = registry.commit(replace(change(promoted.adapter), removals=("a", "b")))
    assert registry.versions(uid) == []
    assert len(emptied.gone) == KEPT_VERSIONS
    after = append(registry, emptied.adapter, "x", "y")
    assert after.version is not None
    assert after.version.number == newest + 1


def test_promotes_and_rolls_back(registry: Registry) -> None:
    first = create(registry)
    second = append(registry, first.adapter, "c")
    back = registry.promote(first.adapter.uid, 1)
    assert back.adapter.live == 1
    assert back.adapter.epoch > second.adapter.epoch
    assert back.adapter.revision == second.adapter.revision
    assert back.adapter.examples == 3
    assert first.version is not None
    assert back.alias.artifact == first.version.artifact
    same = registry.promote(first.adapter.uid, 1)
    assert same.adapter == back.adapter
    with pytest.raises(UnknownVersion):
        registry.promote(first.adapter.uid, 9)
    with pytest.raises(UnknownAdapter):
        registry.promote(new_uid(), 1)


def test_promotes_only_what_if_match_names(registry: Registry) -> None:
    first = create(registry)
    second = append(registry, first.adapter, "c")
    with pytest.raises(AliasMoved):
        registry.promote(first.adapter.uid, 1, if_match=first.adapter.etag)
    assert registry.promote(first.adapter.uid, 1, if_match=second.adapter.etag).adapter.live == 1
    etag = registry.adapter("acme", "pets").etag
    assert registry.commit(replace(change(second.adapter), upserts=())).adapter.etag == etag
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(registry.promote, first.adapter.uid, 2, etag) for _ in range(8)]
    errors = [future.exception() for future in futures]
    assert errors.count(None) == 1
    assert all(isinstance(error, AliasMoved) for error in errors if error is not None)


def test_a_rebase_moves_the_adapter_and_leaves_old_versions_their_backbone(registry: Registry) -> None:
    first = create(registry)
    segment, inputs = artifact("new"), artifact("new inputs")
    committed = registry.commit(
        replace(
            change(first.adapter),
            rebase=Rebase("lite1", "e" * 64),
            repoints=(Repoint("a", segment, 0, inputs), Repoint("b", segment, 1, inputs)),
            version=version(),
            promote=True,
        )
    )
    assert (committed.adapter.backbone, committed.adapter.fingerprint) == ("lite1", "e" * 64)
    assert registry.version(first.adapter.uid, 1).fingerprint == "f" * 64
    assert (committed.alias.backbone, committed.alias.fingerprint) == ("lite1", "e" * 64)
    old = registry.resolve("acme", "pets", 1)
    assert (old.backbone, old.fingerprint, old.version) == ("minilm-l6-v2", "f" * 64, 1)
    assert len(committed.unreferenced) == 2


def test_deletes_everything_of_an_adapter(registry: Registry) -> None:
    kept, gone = create(registry, "kept"), create(registry)
    assert registry.delete_adapter("acme", "pets")[1] == gone.adapter.uid
    assert registry.referenced(gone.adapter.uid) == set()
    assert registry.examples(gone.adapter.uid) == []
    assert registry.versions(gone.adapter.uid) == []
    with pytest.raises(UnknownAdapter):
        registry.all_examples(gone.adapter.uid)
    assert registry.adapters("acme") == [kept.adapter]
    assert len(registry.referenced(kept.adapter.uid)) == 4


def test_an_epoch_tells_nothing_of_other_tenants(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the time of the change; where the clock stands still, one more than the adapter's last one."""
    own = create(registry).adapter
    assert abs(own.epoch - own.created_at.timestamp() * 1e6) < 10e6
    for number in range(20):
        create(registry, f"a{number}", tenant="umbrella")
    later = refit(registry, own).adapter
    assert abs(later.epoch - datetime.now(UTC).timestamp() * 1e6) < 10e6
    stands = datetime.fromtimestamp(later.epoch / 1e6 - 3600, UTC)
    monkeypatch.setattr("adapters.registry.statements.changes.current_time", lambda connection: stands)
    theirs = registry.adapter("umbrella", "a0")
    for number in range(1, 4):
        for _ in range(5):
            refit(registry, theirs)
        assert refit(registry, own).adapter.epoch == later.epoch + number
    assert registry.adapter("umbrella", "a0").epoch == theirs.epoch + 15


def test_no_two_changes_to_an_adapter_have_one_epoch(registry: Registry, registry_url: str) -> None:
    adapter = create(registry).adapter
    others = [Registry(registry_url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: [refit(one, adapter).adapter.epoch for _ in range(5)], others))
    for one in others:
        one.close()
    epochs = sorted(epoch for some in found for epoch in some)
    assert len(set(epochs)) == 20
    assert all(some == sorted(some) for some in found)
    assert registry.adapter("acme", "pets").epoch == epochs[-1]
    assert epochs[0] > adapter.epoch


def test_the_record_of_changes_is_bounded(registry: Registry, registry_url: str) -> None:
    first = create(registry)
    database = Database(registry_url)
    with database.writing() as connection:
        old = "1" if registry_url.startswith("sqlite") else "now() - interval '2 hours'"
        for _ in range(150):
            connection.exec_driver_sql(
                f"INSERT INTO changes (tenant, name, at) VALUES ('acme', 'old', {old})"
            )
    for _ in range(2):
        refit(registry, first.adapter)
    with database.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM changes WHERE name = 'old'").scalar_one() == 0
    database.close()


def test_a_closed_database_closes_the_connections_that_are_in_use(registry_url: str) -> None:
    database = Database(registry_url)
    with database.reading() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        database.close()
        assert connection.scalar(text("SELECT 1")) == 1
    with pytest.raises((sqlite3.ProgrammingError, psycopg.OperationalError), match="closed"):
        driver.cursor().execute("SELECT 1")


def test_thousands_of_examples_come_and_go(registry: Registry) -> None:
    ids = [f"{number:05d}" for number in range(5_000)]
    first = create(registry, ids=ids)
    uid = first.adapter.uid
    revision, found = registry.all_examples(uid)
    assert revision == 1
    assert [record.id for record in found] == ids
    assert found[-1].row == 4_999
    segment = artifact("other")
    moved = registry.commit(
        replace(
            change(first.adapter), repoints=tuple(Repoint(name, segment, row) for row, name in enumerate(ids))
        )
    )
    assert len(moved.unreferenced) == 2
    assert registry.example(uid, "04999").segment == segment
    emptied = registry.commit(replace(change(moved.adapter), removals=tuple(ids)))
    assert emptied.adapter.examples == 0
    assert registry.examples(uid) == []


def appends_until_done(url: str, worker: int, count: int) -> None:
    registry = Registry(url)
    for step in range(count):
        while True:
            try:
                append(registry, registry.adapter("acme", "pets"), f"{worker}-{step}")
                break
            except RevisionMoved:
                continue
    registry.close()


def test_threads_that_append_to_one_adapter_leave_no_gap_and_no_number_twice(
    registry: Registry, registry_url: str
) -> None:
    first = create(registry)
    threads = [
        threading.Thread(target=appends_until_done, args=(registry_url, worker, 5)) for worker in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_appended(registry, first, 8, 5)


def test_processes_that_append_to_one_adapter_leave_no_gap_and_no_number_twice(
    registry: Registry, registry_url: str
) -> None:
    first = create(registry)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=appends_until_done, args=(registry_url, worker, 8)) for worker in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    check_appended(registry, first, 3, 8)


def check_appended(registry: Registry, first: Committed, workers: int, count: int) -> None:
    uid = first.adapter.uid
    revision, found = registry.all_examples(uid)
    assert {record.id for record in found} == {"a", "b"} | {
        f"{w}-{s}" for w in range(workers) for s in range(count)
    }
    assert revision == 1 + workers * count
    newest = 1 + workers * count
    kept = registry.versions(uid)
    assert [record.number for record in kept] == list(range(newest, newest - KEPT_VERSIONS, -1))
    assert [record.revision for record in kept] == [record.number for record in kept]
    assert registry.adapter("acme", "pets").live == newest
    heads = {record.artifact for record in kept}
    assert registry.referenced(uid) == heads | {record.segment for record in found} | {
        record.inputs for record in found if record.inputs
    }


def test_many_requests_creating_one_adapter_create_one(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(create, registry) for _ in range(8)]
    errors = [future.exception() for future in futures]
    assert errors.count(None) == 1
    assert all(isinstance(error, AdapterExists) for error in errors if error is not None)
    assert len(registry.adapters("acme")) == 1


def test_readers_see_one_state_while_others_write(registry: Registry) -> None:
    first = create(registry, ids=("a",))
    stop = threading.Event()
    failures: list[object] = []

    def read() -> None:
        while not stop.is_set():
            revision, found = registry.all_examples(first.adapter.uid)
            # Each commit adds as many examples as its revision counts.
            if len(found) != revision:
                failures.append((revision, len(found)))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    adapter = first.adapter
    for step in range(30):
        adapter = append(registry, adapter, f"new-{step}").adapter
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []


KILLED = """
import sys
from dataclasses import replace
from pathlib import Path
from adapters.storage.local import LocalStore
from adapters.registry.registry import Registry
from adapters.registry.records import Change, ExampleWrite, NewVersion
url, root = sys.argv[1:]
registry, store = Registry(url), LocalStore(Path(root))
step = 0
while True:
    adapter = registry.adapter("acme", "pets")
    segment, head = store.publish_all("acme", adapter.uid, [b"segment" * 1000, b"head" * 1000])
    example = ExampleWrite(f"{segment.nonce}", "d" * 64, "cat", segment, 0)
    committed = registry.commit(Change("acme", "pets", adapter.uid, adapter.revision, upserts=(example,),
                           version=NewVersion("linear_probe", head, None, {}, 2), promote=True))
    print(committed.version.number, flush=True)
    store.delete("acme", adapter.uid, committed.unreferenced)
"""


def test_a_kill_at_any_moment_loses_no_acknowledged_version_and_leaves_no_row_without_bytes(
    registry: Registry, registry_url: str, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path / "artifacts")
    uid = new_uid()
    head = store.publish("acme", uid, b"first head")
    first = NewVersion("linear_probe", head, None, {}, 2)
    registry.commit(Change("acme", "pets", uid, 0, create=TEXTS, version=first, promote=True))
    acknowledged = 1
    for number in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, registry_url, str(tmp_path / "artifacts")], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        acknowledged = int(child.stdout.readline())
        # The kill comes after the first acknowledgement, at another millisecond in each round.
        time.sleep(number * 0.002)
        child.send_signal(signal.SIGKILL)
        numbers = [int(line) for line in child.stdout.read().split()]
        acknowledged = max([acknowledged, *numbers])
        child.wait()
        child.stdout.close()
        adapter = registry.adapter("acme", "pets")
        assert adapter.live is not None
        assert adapter.live in (acknowledged, acknowledged + 1)
        for referenced in registry.referenced(uid):
            store.read("acme", uid, referenced)


KILLED_IN_COMMIT = """
import os, signal, sys
from sqlalchemy import event
from adapters.registry.registry import Registry
from adapters.registry.records import Change, NewVersion
from adapters.storage.artifact import Artifact
url, uid, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
registry = Registry(url)
seen = 0
@event.listens_for(registry._database._engine, "after_cursor_execute")
def kill(connection, cursor, statement, *rest):
    global seen
    seen += not statement.startswith("SELECT")
    if seen == count:
        os.kill(os.getpid(), signal.SIGKILL)
registry.commit(Change("acme", "pets", uid, 1, clear_first=True,
                version=NewVersion("linear_probe", Artifact.describe(b"x"), None, {}, 2), promote=True))
"""


@pytest.mark.parametrize("count", [2, 4, 6])
def test_a_kill_inside_the_transaction_undoes_it(registry: Registry, registry_url: str, count: int) -> None:
    first = create(registry)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_IN_COMMIT, registry_url, first.adapter.uid, str(count)]
    )
    assert done.returncode == -9
    assert registry.adapter("acme", "pets") == first.adapter
    assert [found.number for found in registry.versions(first.adapter.uid)] == [1]
    assert len(registry.referenced(first.adapter.uid)) == 4
    assert append(registry, first.adapter, "c").adapter.live == 2


def test_sqlite_is_set_up_to_be_durable_and_to_forget(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'topwork.db'}")
    registry.migrate()
    database = Database(f"sqlite:///{tmp_path / 'topwork.db'}")
    with database.reading() as connection:

        def pragma(name: str) -> object:
            return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()

        settings = (pragma("journal_mode"), pragma("synchronous"))
        assert settings in {("delete", 3), ("wal", 2)}
        assert (pragma("foreign_keys"), pragma("secure_delete")) == (1, 1)
    database.close()
    created = create(registry, "secretive", ids=("very-private-id", "b"))
    segment = artifact("rewritten")
    registry.commit(
        replace(change(created.adapter), removals=("very-private-id",), repoints=(Repoint("b", segment, 0),))
    )
    registry.close()
    assert b"very-private-id" not in (tmp_path / "topwork.db").read_bytes()


def test_wal_only_where_sqlite_does_not_lose_it() -> None:
    buggy = [(3, 7, 0), (3, 40, 1), (3, 44, 5), (3, 45, 0), (3, 50, 6), (3, 51, 0), (3, 51, 2)]
    fixed = [(3, 44, 6), (3, 50, 7), (3, 51, 3), (3, 52, 0), (4, 0, 0)]
    assert [version for version in buggy + fixed if wal_is_safe(version)] == fixed


def test_a_database_in_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="file"):
        Registry("sqlite://")


def test_a_database_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for url in (f"sqlite:///{tmp_path / 'folder'}", f"postgresql+psycopg://x@/x?host={tmp_path}"):
        registry = Registry(url)
        with pytest.raises(RegistryUnavailable):
            registry.adapter("acme", "pets")
        registry.close()


def test_a_lock_that_another_process_holds_for_ever_is_unavailable(
    registry: Registry, registry_url: str
) -> None:
    first = create(registry)
    impatient, other = Registry(registry_url, patience=0.2), Database(registry_url)
    with other.writing() as connection:
        connection.exec_driver_sql("UPDATE adapters SET examples = 7")
        assert impatient.adapter("acme", "pets") == first.adapter
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(append, impatient, first.adapter, "c") for _ in range(3)]
        assert all(isinstance(future.exception(), RegistryUnavailable) for future in futures)
        connection.exec_driver_sql("UPDATE adapters SET examples = 2")
    assert append(impatient, first.adapter, "c").adapter.live == 2
    impatient.close()
    other.close()


def test_a_database_that_restarts_is_found_again(postgres_url: str) -> None:
    registry = Registry(postgres_url)
    registry.migrate()
    first = create(registry)
    database = Database(postgres_url)
    with database.reading() as connection:
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        connection.exec_driver_sql(f"{others} AND backend_type = 'client backend'")
    database.close()
    assert registry.adapter("acme", "pets") == first.adapter
    assert append(registry, first.adapter, "c").adapter.live == 2
    registry.close()


def test_a_full_disk_of_the_database_is_a_full_store(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'topwork.db'}")
    registry.migrate()
    first = create(registry)
    limit_pages(registry)
    with pytest.raises(StoreFull):
        create(registry, "many", ids=[f"{number:0100d}" for number in range(5000)])
    assert registry.adapters("acme") == [first.adapter]
    registry.close()


def limit_pages(registry: Registry) -> None:
    """SQLite answers the same for a full disk and for a database at its largest."""
    from sqlalchemy import event

    @event.listens_for(registry._database._engine, "begin")
    def limit(connection: object) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 60")  # type: ignore[attr-defined]


def test_groups_and_sampling_read_back_as_they_were_written(registry: Registry) -> None:
    segment = artifact("segment")
    wanted = {"a": (None, True), "b": ("customer 1", False), "c": ("ünï 🐱", True)}
    upserts = tuple(
        replace(example(name, segment, row), group=group, sampled=sampled)
        for row, (name, (group, sampled)) in enumerate(wanted.items())
    )
    uid = new_uid()
    registry.commit(Change("acme", "pets", uid, 0, create=TEXTS, upserts=upserts))
    assert {one.id: (one.group, one.sampled) for one in registry.examples(uid)} == wanted
    moved = (Repoint("b", artifact("other"), 0),)
    corrected = (replace(upserts[2], group=None, sampled=False),)
    registry.commit(Change("acme", "pets", uid, 1, upserts=corrected, repoints=moved))
    assert {one.id: (one.group, one.sampled) for one in registry.examples(uid)} == {
        **wanted,
        "c": (None, False),
    }


def test_what_is_wanted_of_answers_changes_with_a_commit_and_moves_the_revision(registry: Registry) -> None:
    first = create(registry).adapter
    assert (first.answer_accuracy, first.weights) == (0.95, "none")
    change = Change("acme", "pets", first.uid, first.revision, answer_accuracy=0.9, weights="balanced")
    second = registry.commit(change).adapter
    assert (second.answer_accuracy, second.weights, second.revision) == (0.9, "balanced", first.revision + 1)
    # A fit for what was wanted before comes too late.
    with pytest.raises(RevisionMoved):
        registry.commit(Change("acme", "pets", first.uid, first.revision, version=version(), promote=True))
    same = replace(change, revision=second.revision)
    assert registry.commit(same).adapter.revision == second.revision
    kept = registry.commit(Change("acme", "pets", first.uid, second.revision, version=version())).adapter
    assert (kept.answer_accuracy, kept.weights) == (0.9, "balanced")
    strict = replace(TEXTS, answer_accuracy=0.999, weights="balanced")
    made = registry.commit(Change("acme", "strict", new_uid(), 0, create=strict)).adapter
    assert (made.answer_accuracy, made.weights, made.revision) == (0.999, "balanced", 0)


def test_descriptions_and_costs_of_labels_change_with_a_commit_and_move_the_revision(
    registry: Registry,
) -> None:
    meanings = {"delivery": "", "refund": "money back, “naïve” 💶"}
    named = replace(TEXTS, meanings=meanings, costs={"refund": 2.5})
    first = registry.commit(Change("acme", "mails", new_uid(), 0, create=named)).adapter
    assert (first.meanings, first.costs, first.revision) == (meanings, {"refund": 2.5}, 0)
    kept = registry.commit(Change("acme", "mails", first.uid, 0, answer_accuracy=0.9)).adapter
    assert (kept.meanings, kept.costs) == (meanings, {"refund": 2.5})
    change = Change("acme", "mails", first.uid, kept.revision, meanings={"refund": ""}, costs={})
    changed = registry.commit(change).adapter
    assert (changed.meanings, changed.costs, changed.revision) == ({"refund": ""}, {}, kept.revision + 1)
    # A fit for what the labels meant before comes too late.
    with pytest.raises(RevisionMoved):
        registry.commit(Change("acme", "mails", first.uid, kept.revision, version=version(), promote=True))
    same = registry.commit(replace(change, revision=changed.revision)).adapter
    assert same.revision == changed.revision
    assert registry.adapter("acme", "mails").meanings == {"refund": ""}
    # A page of adapters may hold a thousand of them, so it leaves the descriptions out.
    assert [(one.name, one.meanings) for one in registry.adapters("acme")] == [("mails", {})]
