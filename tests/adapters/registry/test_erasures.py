"""Erasure of tenants, adapters and examples: rows and pages, on SQLite and PostgreSQL; files and memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update

from adapters.adaptation.commands import AdaptCommand
from adapters.adaptation.erasure import ErasureSweeper
from adapters.examples.validation import PostedExample
from adapters.probe.fit import OneLabel
from adapters.registry.database import Database
from adapters.registry.erasures import ALL, ERASURES_KEPT, TenantErased, digest
from adapters.registry.errors import LeaseLost, RegistryUnavailable, UnknownAdapter, UnknownTenant
from adapters.registry.records import AdapterRecord, Change, Changed, Repoint
from adapters.registry.registry import Registry, new_uid
from adapters.registry.schema import changes, chores, erasures, metadata
from adapters.registry.statements.queries import current_time
from adapters.storage.artifact import Artifact, Store
from adapters.storage.local import LocalStore
from adapters.storage.open import open_store
from tests.support.adapters.adapter_stack import TENANT, says, taught, world
from tests.support.adapters.job_records import begin, submit
from tests.support.adapters.records import TEXTS, append, artifact, change, create, example, refit
from tests.support.adapters.records import version as new_version

anyio = pytest.mark.anyio


def rows(registry: Registry) -> dict[str, list[Any]]:
    """Everything in the database but what is remembered of erasures."""
    with registry._database.reading() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(select(table))]
            for table in metadata.sorted_tables
            if table not in (erasures, chores)
        }


def remembered(registry: Registry) -> list[Any]:
    with registry._database.reading() as connection:
        return list(connection.execute(select(erasures).order_by(erasures.c.id)))


def unfinished(registry: Registry) -> list[list[str]]:
    """The uids whose files may still exist, of each erasure."""
    return [row.files.split() for row in remembered(registry) if row.files is not None]


def new(registry: Registry, tenant: str, *, began: float) -> None:
    """An adapter of a request that was read `began` seconds ago."""
    created = replace(TEXTS, began=time.monotonic() - began)
    registry.commit(Change(tenant, "late", new_uid(), 0, create=created))


def test_a_tenant_goes_with_all_that_it_has(registry: Registry) -> None:
    create(registry, tenant="other")
    registry.tenants.create_key("other", ["predict"])
    before = rows(registry)
    position = registry.changed(None).position
    first = create(registry).adapter
    second = append(registry, create(registry, "birds").adapter, "c").adapter
    registry.delete_adapter("acme", "birds")
    second = create(registry, "birds").adapter
    registry.tenants.create_key("acme", ["predict"])
    submit(registry)
    receipt = registry.erasures.tenant("acme")
    assert (receipt.adapters, receipt.examples, receipt.versions, receipt.jobs, receipt.keys) == (
        2,
        4,
        2,
        1,
        1,
    )
    assert [set(files) for files in unfinished(registry) if "*" in files] == [{first.uid, second.uid, "*"}]
    after = rows(registry)
    # The changes keep their numbers, which other processes read on from, but no names of adapters.
    del before["changes"]
    assert {row[1:3] for row in after.pop("changes")} == {("other", "pets"), ("acme", "")}
    assert after == before
    with pytest.raises(UnknownTenant):
        registry.erasures.tenant("acme")
    with pytest.raises(UnknownTenant):
        registry.tenants.tenant("acme")
    assert registry.changed(position).changes == (Changed("acme", "", None, None, gone=True),)


def remove_the_second(registry: Registry, adapter: AdapterRecord) -> None:
    """One of three examples in a file is erased; the others are rewritten."""
    others = enumerate(("secret-1", "secret-3"))
    repoints = tuple(
        Repoint(identity, artifact("rewritten"), row, artifact("rewritten-inputs"))
        for row, identity in others
    )
    registry.commit(replace(change(adapter), removals=("secret-2",), repoints=repoints))


def test_ended_jobs_do_not_tell_of_erased_examples(registry: Registry) -> None:
    adapter = create(registry, ids=("secret-1", "secret-2", "secret-3")).adapter
    submit(registry)
    ended = begin(registry)
    errors = [
        {"place": f"line {n}", "code": "conflicting", "detail": f"secret-{n}: two labels"} for n in (2, 3)
    ]
    registry.jobs.heartbeat(ended, 60, {"share": 1.0, "rejected": 2, "errors": errors})
    registry.jobs.fail(ended, "one_label", "There is only secret-3 here.")
    submit(registry)
    running = begin(registry)
    registry.jobs.heartbeat(running, 60, {"share": 0.5, "errors": errors})

    def told() -> tuple[Any, str | None]:
        job = registry.jobs.job("acme", ended.job.id)
        assert job.progress is not None
        return job.progress["errors"], job.error_detail

    remove_the_second(registry, adapter)
    assert told() == (errors[1:], "There is only secret-3 here.")
    adapter = registry.adapter("acme", "pets")
    registry.commit(replace(change(adapter), removals=("secret-1", "secret-3")))
    remaining, detail = told()
    assert remaining == []
    assert detail is not None
    assert "secret" not in detail
    # Its attempt reports again, of an upload that goes on.
    still = registry.jobs.job("acme", running.job.id).progress
    assert still is not None
    assert still["errors"] == errors


def test_what_was_erased_is_remembered_without_what_it_was(registry: Registry) -> None:
    adapter = create(registry, ids=("secret-1", "secret-2", "secret-3")).adapter
    remove_the_second(registry, adapter)
    adapter = registry.adapter("acme", "pets")
    done = registry.commit(replace(change(adapter), removals=("secret-1", "secret-3")))
    registry.delete_adapter("acme", "pets")
    registry.erasures.tenant("acme")
    some, everything, whole, tenant = remembered(registry)
    assert (some.adapter_uid, some.examples, some.files) == (adapter.uid, digest("secret-2"), None)
    assert (everything.adapter_uid, everything.examples, everything.id) == (adapter.uid, ALL, done.erasure)
    assert (whole.adapter_uid, whole.examples, whole.files) == (adapter.uid, None, adapter.uid)
    assert (tenant.tenant, tenant.adapter_uid, tenant.files) == ("acme", None, "*")
    assert "secret" not in repr(remembered(registry))


def test_a_removal_tells_the_others_and_a_commit_does_not(registry: Registry) -> None:
    position = registry.changed(None).position
    adapter = refit(registry, create(registry).adapter).adapter
    news = registry.changed(position)
    assert [(change.name, change.gone) for change in news.changes] == [("pets", False)]
    registry.commit(replace(change(adapter), removals=("a", "b")))
    news = registry.changed(news.position)
    assert [(change.name, change.gone) for change in news.changes] == [("pets", True)]


def test_nothing_older_than_the_erasure_comes_after_it(registry: Registry) -> None:
    create(registry)
    registry.erasures.tenant("acme")
    with pytest.raises(TenantErased):
        new(registry, "acme", began=30.0)
    # The tenant stays erased while other processes may still accept its keys.
    with pytest.raises(TenantErased):
        new(registry, "acme", began=0.0)
    with pytest.raises(TenantErased):
        registry.tenants.create("acme")
    new(registry, "other", began=30.0)
    _age(registry, 6.0)
    with pytest.raises(TenantErased):
        new(registry, "acme", began=5.5)
    new(registry, "acme", began=1.0)
    assert registry.adapter("acme", "late").revision == 0


def _age(registry: Registry, seconds: float) -> None:
    """As if all erasures had been so much earlier."""
    with registry._database.writing() as connection:
        for row in connection.execute(select(erasures)).all():
            past = timedelta(seconds=seconds)
            due = None if row.files_due_at is None else row.files_due_at - past
            values = {"at": row.at - past, "files_due_at": due}
            connection.execute(update(erasures).where(erasures.c.id == row.id).values(values))


def test_jobs_that_run_lose_their_lease(registry: Registry) -> None:
    adapter = create(registry).adapter
    submit(registry)
    claim = begin(registry)
    registry.erasures.tenant("acme")
    with pytest.raises(LeaseLost):
        registry.jobs.heartbeat(claim, 60)
    with pytest.raises(LeaseLost):
        registry.commit(replace(change(adapter), version=new_version()), job=claim)


def test_old_erasures_are_forgotten_once_their_files_are_gone(registry: Registry) -> None:
    create(registry, "one")
    create(registry, "two")
    (_, first), (_, second) = (registry.delete_adapter("acme", name) for name in ("one", "two"))
    assert unfinished(registry) == [[first], [second]]
    registry.remains.finish(remembered(registry)[0].id)
    _age(registry, (ERASURES_KEPT + timedelta(days=1)).total_seconds())
    create(registry, "three")
    registry.delete_adapter("acme", "three")
    assert len(remembered(registry)) == 2
    assert unfinished(registry)[0] == [second]


def test_creations_and_erasures_at_once_leave_nothing_behind(registry: Registry) -> None:
    """Whichever is first: an adapter that was created before is gone, and one that comes after is refused."""
    for number in range(15):
        tenant = f"t{number}"
        create(registry, tenant=tenant)
        before = time.monotonic()

        def adapt(name: str, tenant: str = tenant, before: float = before) -> None:
            created = replace(TEXTS, began=before)
            upserts = (example("a", artifact()),)
            with suppress(TenantErased):
                registry.commit(
                    Change(tenant, name, new_uid(), 0, created, upserts=upserts, version=new_version())
                )

        with ThreadPoolExecutor(5) as pool:
            adapts = [pool.submit(adapt, f"a{place}") for place in range(3)]
            erasing = pool.submit(registry.erasures.tenant, tenant)
            adapts += [pool.submit(adapt, f"b{place}") for place in range(2)]
            erasing.result()
            for one in adapts:
                one.result()
        assert registry.adapters(tenant) == []
        with pytest.raises(UnknownTenant):
            registry.tenants.tenant(tenant)


def test_pages_keep_nothing_of_what_was_deleted(tmp_path: Path) -> None:
    """SQLite's own overwriting leaves copies that it made when it moved rows within their page."""
    path = tmp_path / "topwork.db"
    registry = Registry(f"sqlite:///{path}")
    registry.migrate()
    for number in range(8):
        tenant = "canaried" if number % 2 else "other"
        word = "CANARY" if number % 2 else "x"
        ids = [f"{word}-{place:03d}" * (place % 7 + 1) for place in range(60)]
        adapter = create(registry, f"pets{number}", ids, tenant).adapter
        registry.commit(
            replace(
                change(adapter),
                upserts=tuple(example(f"{word}+{place}", artifact("more"), place) for place in range(40)),
            )
        )
    registry.tenants.create_key("canaried", ["predict"], note="CANARY")
    assert b"CANARY" in path.read_bytes()
    registry.erasures.tenant("canaried")
    registry.remains.clear_pages()
    found = b"".join(each.read_bytes() for each in tmp_path.iterdir())
    assert b"CANARY" not in found
    assert registry.tenants.tenant("other").adapters == 4
    registry.close()


def test_postgresql_rewrites_its_tables(postgres_url: str) -> None:
    registry = Registry(postgres_url)
    registry.migrate()
    create(registry, ids=[f"CANARY-{place}" for place in range(500)])
    database = Database(postgres_url)

    def pages() -> int:
        with database.reading() as connection:
            size = connection.execute(text("SELECT pg_relation_size('examples')")).scalar_one()
            assert isinstance(size, int)
            return size

    assert pages() > 0
    registry.erasures.tenant("acme")
    registry.remains.clear_pages()
    assert pages() == 0
    database.close()
    registry.close()


def test_what_comes_late_is_deleted_too(registry: Registry, store: Store) -> None:
    """A publication that ends after the erasure, by a process that was killed before it could delete it."""
    adapter = create(registry).adapter
    store.publish("acme", adapter.uid, b"early")
    clearing = ErasureSweeper(registry, store)
    registry.delete_adapter("acme", "pets")
    clearing.clear()
    assert list(store.objects()) == []
    store.publish("acme", adapter.uid, b"late")
    _age(registry, 10.0)
    clearing.clear()
    assert list(store.objects()) == []
    _age(registry, 1_000.0)
    clearing.clear()
    assert unfinished(registry) == []


def test_files_are_deleted_although_pages_cannot_be_cleared(
    registry: Registry, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    def busy(rewritten_bytes: int) -> None:
        tries.append(time.monotonic())
        time.sleep(0.01)
        raise RegistryUnavailable("busy")

    monkeypatch.setattr(registry.remains, "clear_pages", busy)
    monkeypatch.setattr("adapters.adaptation.erasure._REST", 10_000.0)
    adapter = create(registry).adapter
    store.publish("acme", adapter.uid, b"data")
    registry.delete_adapter("acme", "pets")
    sweeper = ErasureSweeper(registry, store)
    with pytest.raises(RegistryUnavailable):
        sweeper.clear()
    assert list(store.objects()) == []
    # A failed attempt is followed by a pause, too, because other writers waited for it.
    sweeper.clear()
    assert len(tries) == 1


def test_what_no_row_knows_of_goes_with_its_tenant(registry: Registry, store: Store) -> None:
    """The files of an adapter that was about to be created, by a process that was killed meanwhile."""
    create(registry)
    store.publish("acme", new_uid(), b"of nobody")
    store.publish("acme-2", new_uid(), b"of another tenant")
    registry.erasures.tenant("acme")
    ErasureSweeper(registry, store).clear()
    assert [found.tenant for found in store.objects()] == ["acme-2"]
    # Once the name can be used again, what has it is another's.
    _age(registry, 6.0)
    store.publish("acme", new_uid(), b"new")
    ErasureSweeper(registry, store).clear()
    assert sorted(found.tenant for found in store.objects()) == ["acme", "acme-2"]


class Slow(LocalStore):
    """A store in which deleting the files of one adapter takes until the next tenant's name is free."""

    def __init__(self, root: Path, registry: Registry) -> None:
        super().__init__(root)
        self._registry = registry

    def delete_adapter(self, tenant: str, adapter_uid: str) -> None:
        super().delete_adapter(tenant, adapter_uid)
        if tenant == "first":
            _age(self._registry, 6.0)
            self.publish("second", new_uid(), b"of who has the name now")


def test_a_slow_deletion_takes_nothing_of_who_has_the_next_name_again(
    registry: Registry, tmp_path: Path
) -> None:
    for tenant in ("first", "second"):
        create(registry, tenant=tenant)
        registry.erasures.tenant(tenant)
    store = Slow(tmp_path / "artifacts", registry)
    ErasureSweeper(registry, store).clear()
    assert [found.tenant for found in store.objects()] == ["second"]


def test_the_files_of_an_erasure_are_deleted_by_one_process(registry: Registry, registry_url: str) -> None:
    other = Registry(registry_url)
    create(registry)
    registry.delete_adapter("acme", "pets")
    (due,) = registry.remains.due_files()
    assert other.remains.due_files() == [due]
    taken = registry.remains.take_files(due)
    assert taken is not None
    assert (other.remains.take_files(due), other.remains.due_files()) == (None, [])
    # The one that took it may have been killed.
    _age(registry, 10.0)
    assert other.remains.due_files() == [due]
    assert other.remains.take_files(due) is not None
    other.close()


@anyio
async def test_what_a_cancelled_request_was_writing_is_deleted(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        for pause in (0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05):
            task = asyncio.create_task(here.adapt(taught(), f"never{pause}"))
            await asyncio.sleep(pause)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            # A commit that has begun goes on.
            await _eventually(
                lambda: set(here.files()) <= {adapter.uid for adapter in here.registry.adapters(TENANT)}
            )


def test_the_last_adapter_takes_the_tenants_folder_along(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "artifacts"))
    uids = [new_uid(), new_uid()]
    for uid in uids:
        store.publish("acme", uid, b"data")
    store.delete_adapter("acme", uids[0])
    assert [folder.name for folder in (tmp_path / "artifacts").glob("[!.]*")] == ["acme"]
    store.delete_adapter("acme", uids[1])
    assert list((tmp_path / "artifacts").glob("[!.]*")) == []
    assert list((tmp_path / "artifacts" / ".deleted").iterdir()) == []
    store.publish("acme", uids[1], b"again")
    assert len(list(store.objects())) == 1


@anyio
async def test_an_erased_tenant_is_in_no_memory_of_any_process(tmp_path: Path) -> None:
    async with world(tmp_path) as here, world(tmp_path) as there:
        await here.adapt(taught(), "words")
        await here.adapt(taught(), "others")
        for process in (here, there):
            for name in ("words", "others"):
                await process.predict([says("one", 1)], name, explain=1)
            assert len(process.heads) > 0
        receipt = await here.eraser.tenant(TENANT)
        assert (receipt.adapters, receipt.examples) == (2, 16)
        assert set(here.ended) == {TENANT}
        assert here.files() == {}
        await _eventually(lambda: set(there.ended) == {TENANT})
        for process in (here, there):
            assert len(process.heads) == 0
            assert len(process.aliases) == 0
            assert len(process.neighbour_index._known) == 0
            assert len(process.repository._embeddings) == 0
            with pytest.raises(UnknownAdapter):
                await process.predict([says("one", 1)])


@anyio
async def test_a_removed_example_leaves_the_memory_of_other_processes(tmp_path: Path) -> None:
    async with world(tmp_path) as here, world(tmp_path) as there:
        await here.adapt([*taught(), PostedExample(says("one", 99), "one", "wanted-gone")])
        await there.predict([says("one", 1)], explain=9)
        assert len(there.repository._embeddings) > 0
        revised = await here.editor.remove(TENANT, "words", ["wanted-gone"])
        assert revised.committed.erasure is not None
        await _eventually(lambda: len(there.repository._embeddings) == 0)
        await _eventually(lambda: len(there.heads) == 0)
        assert there.ended == []
        (item,) = (await there.predict([says("one", 1)], explain=9)).items
        assert "wanted-gone" not in repr(item)
        here.check()


@anyio
async def test_another_tenant_keeps_what_it_has_in_memory(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        await here.predict([says("one", 1)])
        await here.pipeline.adapt("other", AdaptCommand("words", taught(3)))
        await here.eraser.tenant("other")
        misses = here.heads.misses
        await here.predict([says("one", 1)])
        assert here.heads.misses == misses


@anyio
async def test_adapts_that_race_with_the_erasure_leave_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        for number in range(8):
            await here.adapt(taught(), f"words{number}")
        racing = [
            asyncio.create_task(
                here.adapt([PostedExample(says("one", 100 + number), "one", "new")], f"words{number}")
            )
            for number in range(8)
        ] + [asyncio.create_task(here.adapt(taught(), f"new{number}")) for number in range(4)]
        await asyncio.sleep(0.02)
        await here.eraser.tenant(TENANT)
        results = await asyncio.gather(*racing, return_exceptions=True)
        failed = [one for one in results if isinstance(one, BaseException)]
        assert {type(one) for one in failed} <= {UnknownAdapter, TenantErased, OneLabel}, failed
        assert here.registry.adapters(TENANT) == []
        assert here.files() == {}


class Interrupted(LocalStore):
    """A store that calls `meanwhile`, once, before the next file is read."""

    meanwhile: Callable[[], object] | None = None

    def read(self, tenant: str, adapter_uid: str, artifact: Artifact) -> bytes:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().read(tenant, adapter_uid, artifact)


@anyio
async def test_who_reads_while_the_adapter_is_erased_hears_that_it_is_gone(tmp_path: Path) -> None:
    store = Interrupted(tmp_path / "artifacts")
    async with world(tmp_path, store=store) as here:

        def erase() -> None:
            _, uid = here.registry.delete_adapter(TENANT, "words")
            store.delete_adapter(TENANT, uid)

        reads: list[Callable[[], Awaitable[object]]] = [
            lambda: here.predict([says("one", 1)], explain=2),
            lambda: here.catalog.example(TENANT, "words", "one0"),
        ]
        for read in reads:
            await here.adapt(taught())
            await here.predict([says("one", 1)])
            store.meanwhile = erase
            with pytest.raises(UnknownAdapter):
                await read()
            here.eraser.heard(TENANT, "words")


async def _eventually(condition: Any) -> None:
    for _ in range(300):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come to pass")


def test_changes_of_the_release_before_took_nothing_away(registry: Registry) -> None:
    """A process of the release before writes rows without the column."""
    position = registry.changed(None).position
    with registry._database.writing() as connection:
        at = current_time(connection)
        connection.execute(changes.insert().values(tenant="acme", name="pets", at=at))
    assert [change.gone for change in registry.changed(position).changes] == [False]
