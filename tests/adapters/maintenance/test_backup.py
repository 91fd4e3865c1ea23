"""A backup holds one state of the database and all files it refers to, while writers go on."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

import pytest

from adapters.maintenance.backup import (
    ARTIFACTS,
    MANIFEST,
    REGISTRY,
    BackupFailed,
    backup,
    read_manifest,
    sha256_of,
)
from adapters.maintenance.restore import restore
from adapters.maintenance.table_copy import references
from adapters.registry.jobs import upload_request
from adapters.registry.migrations import HEAD
from adapters.storage.open import open_store
from tests.support.adapters.adapter_stack import TENANT, says, taught
from tests.support.adapters.storage_places import Make, Place, churn

pytestmark = pytest.mark.anyio

BACKUPS = 4


async def test_a_backup_is_the_rows_and_their_artifacts(place: Place, tmp_path: Path) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        uid = world.registry.adapter(TENANT, "words").uid
        upload = await world.repository.publish(TENANT, uid, [lambda: b"lines"])
        job = {"upload": upload_request(upload)}
        world.registry.jobs.submit(TENANT, "words", "bulk_adapt", job, deadline_seconds=None, max_open=9)
        orphan = await world.repository.publish(TENANT, uid, [lambda: b"of nobody"])
    path, manifest = backup(place.database, place.store, tmp_path / "backups")
    assert [one.name for one in (tmp_path / "backups").iterdir()] == [path.name]
    assert manifest == read_manifest(path)
    assert json.loads((path / MANIFEST).read_text()) == asdict(manifest)
    assert manifest.schema == HEAD
    assert manifest.registry_sha256 == sha256_of(path / REGISTRY)
    rows = place.rows()
    assert manifest.counts == {name: len(of_table) for name, of_table in rows.items()}
    copied = {(one.tenant, one.adapter_uid, one.name) for one in open_store(str(path / ARTIFACTS)).objects()}
    with place.database.reading() as connection:
        referred = references(connection)
    assert copied == {(tenant, uid, artifact.name) for tenant, uid, artifact in referred}
    assert upload[0] in {artifact for _, _, artifact in referred}
    assert orphan[0] not in {artifact for _, _, artifact in referred}
    assert manifest.artifacts == len(copied)
    for tenant, of, artifact in referred:
        assert open_store(str(path / ARTIFACTS)).read(tenant, of, artifact)
    with sqlite3.connect(path / REGISTRY) as connection_:
        assert connection_.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection_.close()
    assert sorted(one.name for one in path.iterdir()) == sorted([ARTIFACTS, MANIFEST, REGISTRY])


async def test_a_backup_beside_adapts_and_deletions_is_whole(
    place: Place, make: Make, tmp_path: Path
) -> None:
    inputs = [says("one", 90), says("two", 91)]
    paths = []
    async with place.world() as world:
        await world.adapt(taught(), "steady")
        expected = list((await world.predict(inputs, "steady")).items)
        turned, stop = asyncio.Event(), asyncio.Event()
        busy = asyncio.create_task(churn(world, turned, stop))
        for _ in range(BACKUPS):
            async with asyncio.timeout(60):
                await turned.wait()
            turned.clear()
            path, _ = await asyncio.to_thread(backup, place.database, place.store, tmp_path / "backups")
            paths.append(path)
        stop.set()
        await busy
    assert len({sha256_of(path / REGISTRY) for path in paths}) == BACKUPS
    for number, path in enumerate(paths):
        target = make("local", f"target{number}")
        restored = restore(path, target.database, target.store)
        assert restored.adapters >= 1
        assert target.examine() == []
        # Less, where a newer backup beside it knows of what was erased since; and what lay in one file with
        # an example that is erased again is rewritten, embeddings and inputs.
        there = {one.name for one in target.store.objects()}
        rewritten = there - {one.name for one in open_store(str(path / ARTIFACTS)).objects()}
        assert len(rewritten) <= 2 * restored.replayed.examples
    async with target.world() as again:
        assert list((await again.predict(inputs, "steady")).items) == expected


async def test_without_an_artifact_there_is_no_backup(place: Place, tmp_path: Path) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        version = world.registry.versions(place.uid("words"))[0]
    place.overwrite(version.artifact, None)
    with pytest.raises(BackupFailed, match="missing, still after 10 tries"):
        backup(place.database, place.store, tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []


async def test_a_damaged_artifact_is_in_no_backup(place: Place, tmp_path: Path) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        version = world.registry.versions(place.uid("words"))[0]
    place.flip(version.artifact)
    with pytest.raises(BackupFailed, match="damaged"):
        backup(place.database, place.store, tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []


def test_an_empty_service_has_a_backup(place: Place, make: Make, tmp_path: Path) -> None:
    path, manifest = backup(place.database, place.store, tmp_path / "backups")
    assert (manifest.artifacts, manifest.counts["adapters"]) == (0, 0)
    target = make("local", "target")
    assert restore(path, target.database, target.store).adapters == 0
    assert target.examine() == []
