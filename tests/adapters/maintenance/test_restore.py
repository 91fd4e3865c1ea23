"""A backup restored: into either kind of database, under running services, without what was erased."""

from __future__ import annotations

import asyncio
import json
import secrets
import sqlite3
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from adapters.adaptation.example_editor import Amendment
from adapters.maintenance.backup import (
    ARTIFACTS,
    MANIFEST,
    REGISTRY,
    BadBackup,
    backup,
    read_manifest,
    sha256_of,
)
from adapters.maintenance.restore import BackupTooOld, TargetInUse, restore
from adapters.registry.erasures import ERASURES_KEPT
from adapters.registry.errors import RegistryTooNew
from adapters.registry.jobs import upload_request
from adapters.registry.records import JobKind
from adapters.registry.schema import changes, erasures
from tests.support.adapters.adapter_stack import TENANT, World, says, taught
from tests.support.adapters.storage_places import WHERE, Make, Place, Where

pytestmark = pytest.mark.anyio

KINDS: tuple[JobKind, ...] = ("bulk_adapt",)
INPUTS = [says("one", 90), says("two", 91)]


def erase(
    place: Place, adapter_uid: str | None, examples: str | None = None, seconds_ago: float = 0.0
) -> str:
    """The rows that an erasure leaves in the table."""
    row = {
        "id": secrets.token_hex(16),
        "tenant": TENANT,
        "adapter_uid": adapter_uid,
        "examples": examples,
        "files": None,
        "receipt": "{}",
        "at": datetime.now(UTC) - timedelta(seconds=seconds_ago),
    }
    with place.database.writing() as connection:
        connection.execute(insert(erasures), [row])
    return str(row["id"])


def saved(place: Place, folder: Path) -> Path:
    return backup(place.database, place.store, folder / "backups")[0]


def known(place: Place) -> set[str]:
    return {row["id"] for row in place.rows()["erasures"]}


async def answers(world: World, name: str = "words") -> Any:
    return (await world.predict(INPUTS, name)).items


def comparable(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """The rows without what a restore must change."""
    moved = ("epoch", "revision")
    found = {}
    for name, of_table in rows.items():
        if name not in ("changes", "chores", "identity"):
            kept = [
                {
                    key: value.replace(microsecond=value.microsecond // 1000 * 1000)
                    if isinstance(value, datetime)
                    else value
                    for key, value in row.items()
                    if not (name == "adapters" and key in moved)
                }
                for row in of_table
            ]
            found[name] = sorted(str(row) for row in kept)
    return found


@pytest.mark.parametrize("to", WHERE)
async def test_what_is_restored_is_what_was_backed_up(
    place: Place, make: Make, to: Where, tmp_path: Path
) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        await world.adapt([*taught(6)], promote="always")
        others = [replace(one, group="g", sampled=False) for one in taught(3)]
        await world.adapt(others, "others", answer_accuracy=0.9, weights="balanced")
        await world.adapt(taught(), "named", meanings={"one": "ba", "two": "Ö “💶”"}, costs={"one": 2.5})
        world.registry.tenants.create_key(TENANT, ["predict"], note="a key")
        expected = await answers(world)
    path = saved(place, tmp_path)
    target = make(to, "target")
    restored = restore(path, target.database, target.store)
    assert (restored.adapters, restored.replaced, restored.artifacts) == (3, 0, restored.manifest.artifacts)
    assert comparable(target.rows()) == comparable(place.rows())
    assert target.examine() == []
    before = {row["id"] for row in place.rows()["artifacts"]}
    async with target.world() as world:
        assert await answers(world) == expected
        outcome = await world.adapt(taught(8), promote="always")
        assert outcome.revised.version is not None
        assert outcome.revised.version.number == 3
        world.check()
    new = {row["id"] for row in target.rows()["artifacts"]} - before
    assert new
    assert min(new) > max(before)
    assert target.examine() == []


async def test_a_used_target_is_refused_and_left_as_it_is(place: Place, make: Make, tmp_path: Path) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        path = saved(place, tmp_path)
        await world.adapt(taught(5))
        rows, files = place.rows(), world.files()
    with pytest.raises(TargetInUse, match="--replace"):
        restore(path, place.database, place.store)
    assert place.rows() == rows
    assert {one.name for one in place.store.objects()} == {name for names in files.values() for name in names}
    # A tenant is enough.
    other = make("local", "other")
    async with other.world() as world:
        world.registry.tenants.create("somebody")
    with pytest.raises(TargetInUse):
        restore(path, other.database, other.store)


async def test_a_backup_from_before_what_is_remembered_is_refused(place: Place, tmp_path: Path) -> None:
    path = saved(place, tmp_path)
    manifest = json.loads((path / MANIFEST).read_bytes())
    long_ago = datetime.now(UTC) - ERASURES_KEPT - timedelta(hours=1)
    (path / MANIFEST).write_text(json.dumps(manifest | {"created_at": long_ago.isoformat()}))
    with pytest.raises(BackupTooOld, match="--old"):
        restore(path, place.database, place.store)
    restore(path, place.database, place.store, old=True)


async def test_running_services_notice_within_a_second(place: Place, tmp_path: Path) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        was = await answers(world)
        path = saved(place, tmp_path)
        swapped = [replace(one, target={"one": "two", "two": "one"}[str(one.target)]) for one in taught()]
        await world.adapt(swapped, promote="always")
        await world.adapt(taught(2), "later")
        assert [one.label for one in await answers(world)] == ["two", "one"]
        assert await answers(world, "later")
        newest = max(row["epoch"] for row in place.rows()["changes"])
        before = world.registry.adapter(TENANT, "words").epoch
        await asyncio.to_thread(restore, path, place.database, place.store, replace=True)
        until = time.monotonic() + 1
        while (
            (known := world.aliases.known(TENANT, "words")) is None
            or known.epoch <= before
            or (world.aliases.known(TENANT, "later") is not None)
        ):
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        assert await answers(world) == was
        told = [row for row in place.rows()["changes"] if row["epoch"] > newest]
        assert {(row["name"], row["gone"]) for row in told} == {
            ("words", False),
            ("later", True),
            ("", False),
        }
        restored = world.registry.adapter(TENANT, "words").epoch
        assert restored > before
        # Version 2 was there: its number is not given again, and no epoch is.
        outcome = await world.adapt(taught(5), promote="always")
        assert outcome.revised.version is not None
        assert outcome.revised.version.number == 3
        assert outcome.revised.adapter.epoch > restored
    assert place.examine() == []


async def test_a_damaged_backup_changes_nothing(place: Place, make: Make, tmp_path: Path) -> None:
    async with place.world() as world:
        await world.adapt(taught())
    target = make("local", "target")

    def refused(path: Path, said: str) -> None:
        with pytest.raises(BadBackup, match=said):
            restore(path, target.database, target.store)
        assert not any(rows for name, rows in target.rows().items() if name != "identity")
        assert not list(target.store.objects())

    path = saved(place, tmp_path)
    for file in sorted((path / ARTIFACTS).rglob("*-*")):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused(path, "missing or damaged")
        file.unlink()
        refused(path, "missing or damaged")
        file.write_bytes(whole)
    whole = (path / REGISTRY).read_bytes()
    (path / REGISTRY).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(path, "damaged")
    (path / REGISTRY).write_bytes(whole)
    manifest = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(manifest.replace("topwork.backup/1", "topwork.backup/2"))
    refused(path, "topwork.backup/2")
    (path / MANIFEST).unlink()
    refused(path, "not a complete backup")
    (path / MANIFEST).write_text(manifest)
    assert restore(path, target.database, target.store).adapters == 1


def rewrite(path: Path, *statements: str) -> None:
    """Change a backup's database, and its manifest with it."""
    connection = sqlite3.connect(path / REGISTRY)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    manifest = replace(read_manifest(path), registry_sha256=sha256_of(path / REGISTRY))
    (path / MANIFEST).write_text(json.dumps(asdict(manifest)))


async def test_an_older_backup_is_migrated_and_a_newer_one_refused(
    place: Place, make: Make, tmp_path: Path
) -> None:
    async with place.world() as world:
        await world.adapt(taught())
    path = saved(place, tmp_path)
    target = make("local", "target")
    rewrite(path, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(RegistryTooNew, match="9999"):
        restore(path, target.database, target.store)
    assert not any(rows for name, rows in target.rows().items() if name != "identity")
    rewrite(
        path,
        "UPDATE alembic_version SET version_num = '0005'",
        "DROP TABLE rates",
        "DROP TABLE identity",
        "DROP TABLE chores",
        "DROP INDEX jobs_open",
        "DROP INDEX jobs_by_start",
        "DROP INDEX jobs_with_checkpoint",
        "ALTER TABLE jobs DROP COLUMN checkpoint",
        "DROP TABLE erasures",
        "DROP TABLE replies",
        "ALTER TABLE changes DROP COLUMN gone",
        'ALTER TABLE examples DROP COLUMN "group"',
        "ALTER TABLE examples DROP COLUMN sampled",
        "ALTER TABLE adapters DROP COLUMN answer_accuracy",
        "ALTER TABLE adapters DROP COLUMN weights",
        "ALTER TABLE examples DROP COLUMN excluded_since",
        "ALTER TABLE adapters DROP COLUMN rolled_back_at",
        "ALTER TABLE adapters DROP COLUMN restored_at",
        "ALTER TABLE adapters DROP COLUMN meanings",
        "ALTER TABLE adapters DROP COLUMN costs",
    )
    whole = sha256_of(path / REGISTRY)
    assert restore(path, target.database, target.store).adapters == 1
    assert sha256_of(path / REGISTRY) == whole
    assert target.examine() == []


async def test_what_is_set_aside_or_held_is_so_again_and_what_was_erased_since_is_not(
    place: Place, tmp_path: Path
) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        for name in ("one0", "two0"):
            await world.editor.amend(TENANT, "words", name, Amendment(excluded=True))
        await world.catalog.promote(TENANT, "words", 1, None)
        path = saved(place, tmp_path)
        await world.editor.remove(TENANT, "words", ["two0"])
    restore(path, place.database, place.store, replace=True)
    async with place.world() as there:
        adapter = there.registry.adapter(TENANT, "words")
        assert [one.id for one in there.registry.examples(adapter.uid, excluded=True)] == ["one0"]
        assert (adapter.examples, adapter.standing) == (7, (None, None))
        # Both that had learned from what was erased are gone, and the one that had not is there.
        assert [version.number for version in there.registry.versions(adapter.uid)] == [3]


async def test_a_rollback_in_a_backup_holds_again(place: Place, make: Make, tmp_path: Path) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        await world.adapt([])
        held = await world.catalog.promote(TENANT, "words", 1, None)
    target = make("local", "target")
    restore(saved(place, tmp_path), target.database, target.store)
    async with target.world() as there:
        now = there.registry.adapter(TENANT, "words")
        assert held.rolled_back_at is not None
        assert now.rolled_back_at is not None
        assert (now.live, abs(now.rolled_back_at - held.rolled_back_at).total_seconds() < 0.01) == (1, True)
        decision = (await there.adapt([])).revised.decision
        assert decision is not None
        assert decision.reason == "rolled_back"


async def test_a_job_that_ran_is_queued_again(place: Place, make: Make, tmp_path: Path) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        uid = place.uid("words")
        upload = await world.repository.publish(TENANT, uid, [lambda: b"lines"])
        request = {"upload": upload_request(upload)}
        jobs = world.registry.jobs
        jobs.submit(TENANT, "words", "bulk_adapt", request, deadline_seconds=None, max_open=9)
        claim = jobs.claim(600, kinds=KINDS, max_running_per_tenant=1)
        assert claim is not None
        (checkpoint,) = await world.repository.publish(TENANT, uid, [lambda: b"an epoch"])
        jobs.keep_checkpoint(claim, checkpoint)
        assert place.examine(older_than=-60) == []
        path = saved(place, tmp_path)
        jobs.release(claim)
        later = jobs.claim(600, kinds=KINDS, max_running_per_tenant=1)
        assert later is not None
        assert later.job.attempt == 2
        restore(path, place.database, place.store, replace=True)
        (job,) = place.rows()["jobs"]
        assert (job["state"], job["lease_until"], job["attempt"], job["released"]) == ("queued", None, 2, 2)
        assert job["checkpoint"] is None
        again = jobs.claim(600, kinds=KINDS, max_running_per_tenant=1)
        assert again is not None
        assert again.job.attempt == 3
        assert place.store.read(TENANT, uid, upload[0]) == b"lines"
    assert place.examine() == []


async def test_services_read_all_keys_again_after_a_restore(place: Place, tmp_path: Path) -> None:
    """One made since the backup is gone, and others may have other quotas."""
    async with place.world() as world:
        registry = world.registry
        registry.tenants.create(TENANT)
        path = saved(place, tmp_path)
        key, _ = registry.tenants.create_key(TENANT, ["predict"])
        position = registry.changed(None).position
        restore(path, place.database, place.store, replace=True)
        assert registry.tenants.find(key.id) is None
        assert [(told.tenant, told.name, told.gone) for told in registry.changed(position).changes] == [
            ("", "", False)
        ]


async def test_a_revoked_key_stays_revoked(place: Place, tmp_path: Path) -> None:
    async with place.world() as world:
        tenants = world.registry.tenants
        tenants.create(TENANT)
        for note in ("kept", "revoked"):
            tenants.create_key(TENANT, ["predict"], note=note)
        path = saved(place, tmp_path)
        (key,) = [one.id for one in tenants.keys(TENANT) if one.note == "revoked"]
        tenants.revoke(TENANT, key)
        restore(path, place.database, place.store, replace=True)
        in_use = {one.note: one.revoked_at is None for one in tenants.keys(TENANT)}
        assert in_use == {"kept": True, "revoked": False}


@pytest.mark.parametrize("beside", [False, True], ids=["in the target", "in a newer backup"])
async def test_an_erased_example_is_not_restored(
    place: Place, make: Make, beside: bool, tmp_path: Path
) -> None:
    erased = says("one", 2).encode()
    async with place.world() as world:
        await world.adapt(taught(2))
        await world.adapt(taught(4), promote="always")
        assert erased in place.contents()
        path = saved(place, tmp_path)
        row = (await world.editor.remove(TENANT, "words", ["one2"])).committed.erasure
    # Their time is what tells which is newer.
    target, options = place, {"replace": True}
    if beside:
        saved(place, tmp_path)
        target, options = make("local", "target"), {}
    restored = restore(path, target.database, target.store, **options)
    assert restored.replayed.examples == 1
    assert restored.replayed.without_live == {(TENANT, "words")}
    rows = target.rows()
    assert {one["id"] for one in rows["examples"]} == {one.id for one in taught(4)} - {"one2"}
    # Version 1 had not seen it.
    assert [one["number"] for one in rows["versions"]] == [1]
    (adapter,) = rows["adapters"]
    assert (adapter["live"], adapter["examples"]) == (None, 7)
    assert known(target) == {row}
    target.examine(repair=True, older_than=-60)
    assert erased not in target.contents()
    assert says("one", 3).encode() in target.contents()
    assert target.examine() == []
    async with target.world() as world:
        outcome = await world.adapt(taught(4)[:2], promote="always")
        assert outcome.revised.live
        assert await answers(world)


async def test_all_examples_that_were_there_are_not_restored(place: Place, tmp_path: Path) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        uid = place.uid("words")
        upload = await world.repository.publish(TENANT, uid, [lambda: b"lines of an upload"])
        request = {"upload": upload_request(upload)}
        world.registry.jobs.submit(TENANT, "words", "bulk_adapt", request, deadline_seconds=None, max_open=9)
        path = saved(place, tmp_path)
        erase(place, uid, "*")
    restored = restore(path, place.database, place.store, replace=True)
    assert (restored.replayed.examples, restored.replayed.jobs) == (8, 1)
    rows = place.rows()
    assert (rows["examples"], rows["versions"], rows["artifacts"]) == ([], [], [])
    assert rows["jobs"][0]["state"] == "cancelled"
    place.examine(repair=True, older_than=-60)
    assert place.contents() == b""
    assert place.examine() == []


async def test_an_erased_adapter_and_tenant_are_not_restored(
    place: Place, make: Make, tmp_path: Path
) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        await world.adapt(taught(), "others")
        world.registry.tenants.create_key(TENANT, ["predict"])
        path = saved(place, tmp_path)
        row = (await world.eraser.adapter(TENANT, "words")).id
    target = make("local", "target")
    saved(place, tmp_path)
    assert restore(path, target.database, target.store).replayed.adapters == 1
    assert [one["name"] for one in target.rows()["adapters"]] == ["others"]
    assert known(target) == {row}
    second = erase(place, None)
    restored = restore(path, place.database, place.store, replace=True)
    assert (restored.replayed.adapters, restored.replayed.tenants) == (2, 1)
    rows = place.rows()
    assert not any(
        rows[name] for name in ("adapters", "tenants", "keys", "examples", "versions", "artifacts")
    )
    assert known(place) == {row, second}
    with place.database.reading() as connection:
        gone = connection.execute(select(changes.c.name).where(changes.c.gone)).scalars().all()
    assert set(gone) == {"", "others", "words"}


async def test_what_came_after_an_erasure_is_restored(place: Place, make: Make, tmp_path: Path) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        erase(place, place.uid("words"), "*")
        # The tenant's name is taken for a few seconds.
        erase(place, None, seconds_ago=10.0)
        await asyncio.sleep(0.01)
        await world.adapt(taught(5), "again")
        path = saved(place, tmp_path)
    target = make("local", "target")
    # The backup knows of them, and so does one beside it.
    saved(place, tmp_path)
    restored = restore(path, target.database, target.store)
    assert (restored.replayed.adapters, restored.replayed.examples) == (0, 0)
    assert comparable(target.rows()) == comparable(place.rows())
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(restored.manifest.created_at)
