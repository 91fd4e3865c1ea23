"""Restores a backup into a database and a store, without the data that was erased since."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, insert, select, text

from adapters.maintenance.backup import (
    ARTIFACTS,
    REGISTRY,
    BadBackup,
    Manifest,
    Reference,
    read_manifest,
    sha256_of,
)
from adapters.maintenance.erasure_replay import Replayed, erasures_of, replay
from adapters.maintenance.restored_rows import RowRestorer, TargetState
from adapters.maintenance.table_copy import KEPT, TABLES, copy_rows, counters, raise_counters, references
from adapters.registry.database import Database
from adapters.registry.erasures import ERASURES_KEPT
from adapters.registry.identity import Identity
from adapters.registry.schema import adapters, changes, erasures, tenants
from adapters.registry.statements.queries import current_time
from adapters.storage.artifact import Artifact, Buffer, MissingArtifact, Store, StoreError
from adapters.storage.local import LocalStore
from models.errors import DomainError

# Looks for missing artifacts after a restore: a running service may still delete what an older commit left
# unreferenced.
_LOOKS = 3
_LOOK_SECONDS = 0.5  # between two looks
_PARALLEL = 8  # threads that store artifacts
# The tables are locked in the order of a commit, so that the two cannot deadlock. Readers are not blocked.
_LOCK = (
    "LOCK TABLE tenants, keys, adapters, jobs, artifacts, versions, examples, erasures, replies, changes "
    "IN EXCLUSIVE MODE"
)


class TargetInUse(DomainError):
    """The database has tenants or adapters, and `replace` is not set."""

    code = "target_in_use"


class BackupTooOld(DomainError):
    """The backup is so old that some erasures since then may no longer be recorded."""

    code = "backup_too_old"


class _ErasedMeanwhile(Exception):
    """The target has erasures that the copy does not have yet."""


@dataclass(frozen=True, slots=True)
class RestoredBackup:
    """The result of a restore."""

    manifest: Manifest
    adapters: int
    artifacts: int
    replaced: int  # adapters that the target had before
    replayed: Replayed  # erasures since the backup, repeated


def restore(
    backup: Path, database: Database, store: Store, *, replace: bool = False, old: bool = False
) -> RestoredBackup:
    """Restore the backup into the database and the store. Running services notice within a second.

    The backup is verified, and the erasures since then are repeated in a copy, before anything changes.
    Raises BadBackup, BackupTooOld unless `old`, TargetInUse unless `replace`, WrongStore, RegistryTooNew, and
    what database and store raise.
    """
    manifest = read_manifest(backup)
    if not old and datetime.now(UTC) - _time(manifest) > ERASURES_KEPT:
        raise BackupTooOld(
            f"The backup is older than the {ERASURES_KEPT.days} days for which erasures are remembered: data "
            "that was erased earlier would be back. To restore it anyway, use --old."
        )
    with _opened(backup, manifest) as (copy, files):
        _verify(copy, files)
        later = _erased_later(backup, manifest)
        database.migrate()
        _refuse_if_used(database, replace)
        _pair(copy, database, store)
        replayed = Replayed()
        while True:
            known = erasures_of(copy)
            wanted = later | erasures_of(database)
            replay(copy, files, [row for id, row in wanted.items() if id not in known], replayed)
            with copy.reading() as connection:
                held = references(connection)
            with ThreadPoolExecutor(_PARALLEL) as pool:
                list(pool.map(partial(_put, store, files), held))
            try:
                with copy.reading() as source, database.writing() as target:
                    written, replaced = _write(source, target, replace)
                break
            except _ErasedMeanwhile:
                continue
        if replaced:
            _make_sure(store, files, held)
    return RestoredBackup(manifest, written, len(held), replaced, replayed)


class _Overlay:
    """The files of a backup, overlaid by rewritten ones. The backup itself is never written to."""

    def __init__(self, below: LocalStore, above: LocalStore) -> None:
        self._below, self._above = below, above

    def read(self, tenant: str, adapter_uid: str, artifact: Artifact) -> bytes:
        try:
            return self._above.read(tenant, adapter_uid, artifact)
        except MissingArtifact:
            return self._below.read(tenant, adapter_uid, artifact)

    def publish(self, tenant: str, adapter_uid: str, data: Buffer) -> Artifact:
        return self._above.publish(tenant, adapter_uid, data)


@contextmanager
def _opened(backup: Path, manifest: Manifest) -> Iterator[tuple[Database, _Overlay]]:
    """Yield a migrated copy of the backup's database, and its files. Raises BadBackup, RegistryTooNew."""
    artifacts = backup / ARTIFACTS
    if not artifacts.is_dir():
        raise BadBackup(f"{backup} has no folder {ARTIFACTS!r}.")
    with tempfile.TemporaryDirectory(prefix="topwork-restore-") as scratch:
        copy = _open_registry(backup, manifest, Path(scratch))
        try:
            yield copy, _Overlay(LocalStore(artifacts), LocalStore(Path(scratch) / ARTIFACTS))
        finally:
            copy.close()


def _open_registry(backup: Path, manifest: Manifest, scratch: Path) -> Database:
    """Return a migrated copy of the backup's database. Raises BadBackup, RegistryTooNew."""
    path = scratch / REGISTRY
    try:
        shutil.copyfile(backup / REGISTRY, path)
    except FileNotFoundError:
        raise BadBackup(f"{backup} has no {REGISTRY}.") from None
    if sha256_of(path) != manifest.registry_sha256:
        raise BadBackup(f"The {REGISTRY} of {backup} is damaged; use another backup.")
    copy = Database(f"sqlite:///{path}")
    try:
        copy.migrate()
    except BaseException:
        copy.close()
        raise
    return copy


def _verify(copy: Database, files: _Overlay) -> None:
    """Raise BadBackup unless every artifact that the rows refer to is present and intact."""
    with copy.reading() as connection:
        held = references(connection)
    for tenant, uid, artifact in held:
        try:
            files.read(tenant, uid, artifact)
        except StoreError as error:
            raise BadBackup(
                f"The backup's artifact {tenant}/{uid}/{artifact.name} is missing or damaged; "
                "use another backup."
            ) from error


def _erased_later(backup: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return the erasures recorded in newer complete backups beside this one, by id. Raises BadBackup."""
    found: dict[str, dict[str, Any]] = {}
    mine = backup.resolve()
    for other in sorted(mine.parent.iterdir()):
        if other == mine or not other.is_dir():
            continue
        try:
            theirs = read_manifest(other)
        except BadBackup:
            # The folder is not a complete backup.
            continue
        if _time(theirs) < _time(manifest):
            continue
        with tempfile.TemporaryDirectory(prefix="topwork-restore-") as scratch:
            copy = _open_registry(other, theirs, Path(scratch))
            try:
                found |= erasures_of(copy)
            finally:
                copy.close()
    return found


def _time(manifest: Manifest) -> datetime:
    return datetime.fromisoformat(manifest.created_at)


def _pair(copy: Database, database: Database, store: Store) -> None:
    """Give a new database the identity of the lost one that the store belongs to. Raises WrongStore."""
    theirs, mine = Identity(copy), Identity(database)
    if store.identity() == theirs.name:
        mine.take_over(theirs.name)
    mine.check(store)


def _refuse_if_used(database: Database, replace: bool) -> None:
    with database.reading() as connection:
        _refuse(connection, replace)


def _refuse(connection: Connection, replace: bool) -> None:
    if replace:
        return
    for column in (adapters.c.uid, tenants.c.name):
        if connection.scalar(select(column).limit(1)) is not None:
            raise TargetInUse("The database has tenants or adapters already. To replace them, use --replace.")


def _write(source: Connection, target: Connection, replace: bool) -> tuple[int, int]:
    """Replace all rows; return the number of adapters after and before."""
    if target.dialect.name == "postgresql":
        target.execute(text(_LOCK))
    _refuse(target, replace)
    if set(target.scalars(select(erasures.c.id))) - set(source.scalars(select(erasures.c.id))):
        raise _ErasedMeanwhile
    before = TargetState.read(target)
    theirs = counters(source)
    highest = {name: max(number, theirs[name]) for name, number in counters(target).items()}
    arriving = RowRestorer(before, current_time(target))
    replaced = [table for table in TABLES if table not in KEPT]
    for table in reversed(replaced):
        target.execute(delete(table))
    for table in replaced:
        copy_rows(source, target, table, arriving.alter(table))
    tenants_gone = before.tenants - set(target.scalars(select(tenants.c.name)))
    _announce(target, arriving, tenants_gone)
    raise_counters(target, highest)
    return len(arriving.restored), len(before.names)


def _announce(connection: Connection, arriving: RowRestorer, tenants_gone: Iterable[str]) -> None:
    """Record the changed adapters, tenants and keys for running services."""
    told = {name: name in arriving.gone for name in arriving.restored}
    told |= dict.fromkeys(arriving.gone - arriving.restored, True)
    told |= {(tenant, ""): True for tenant in tenants_gone}
    told |= {("", ""): False}
    now = current_time(connection)
    rows = [
        {"tenant": tenant, "name": name, "gone": gone, "at": now} for (tenant, name), gone in told.items()
    ]
    connection.execute(insert(changes), rows)


def _make_sure(store: Store, files: _Overlay, held: Iterable[Reference]) -> None:
    """Put back artifacts that a running service deletes on account of the rows that were replaced."""
    for look in range(_LOOKS):
        if look:
            time.sleep(_LOOK_SECONDS)
        there = {(found.tenant, found.adapter_uid, found.name) for found in store.objects()}
        for tenant, uid, artifact in held:
            if (tenant, uid, artifact.name) not in there:
                _put(store, files, (tenant, uid, artifact))


def _put(store: Store, files: _Overlay, reference: Reference) -> None:
    tenant, uid, artifact = reference
    store.put(tenant, uid, artifact, files.read(tenant, uid, artifact))
