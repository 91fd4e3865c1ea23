"""Backups: one state of the database with every artifact that it refers to, in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import delete, func, select

from adapters.maintenance.table_copy import TABLES, copy_rows, counters, raise_counters, references
from adapters.registry.database import Database
from adapters.registry.migrations import HEAD
from adapters.registry.schema import identity
from adapters.storage.artifact import Artifact, CorruptArtifact, MissingArtifact, Store, object_key
from adapters.storage.files import sync
from models.errors import DomainError

FORM = "topwork.backup/1"
MANIFEST = "MANIFEST.json"
REGISTRY = "registry.sqlite3"
ARTIFACTS = "artifacts"
PARTIAL = ".partial"

_TRIES = 10  # repeated copies of the database, while artifacts are deleted
_PARALLEL = 4  # threads that copy or sync files

Reference = tuple[str, str, Artifact]
"""Tenant, adapter uid, and artifact."""


class BackupFailed(DomainError):
    """No backup was written; the message says why."""

    code = "backup_failed"


class BadBackup(DomainError):
    """The folder is not a usable backup; the message says what is wrong with it."""

    code = "bad_backup"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of a backup, in its MANIFEST.json."""

    form: str
    schema: str  # migration revision of the tables
    created_at: str  # UTC, ISO 8601
    registry_sha256: str
    counts: Mapping[str, int]  # rows by table
    artifacts: int
    artifact_bytes: int


def backup(database: Database, store: Store, folder: Path) -> tuple[Path, Manifest]:
    """Write a backup into a new folder inside `folder`; return its path and its manifest.

    Services may run meanwhile. The tables must be migrated. Raises BackupFailed, OSError, and what database
    and store raise, after removing what was written.
    """
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    final, partial = folder / name, folder / f"{name}{PARTIAL}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial.mkdir(mode=0o700)
    try:
        manifest = _fill(database, store, partial)
        partial.rename(final)
        sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final, manifest


def read_manifest(backup: Path) -> Manifest:
    """Return the manifest of a complete backup. Raises BadBackup."""
    try:
        found = json.loads((backup / MANIFEST).read_bytes())
        form = found["form"]
        if form != FORM:
            raise BadBackup(f"{backup} has the format {form!r}, and this release reads {FORM!r}.")
        manifest = Manifest(**found)
        datetime.fromisoformat(manifest.created_at)
    except FileNotFoundError:
        raise BadBackup(f"{backup} is not a complete backup: it has no {MANIFEST}.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise BadBackup(f"The {MANIFEST} of {backup} cannot be read: {error}.") from error
    return manifest


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill(database: Database, store: Store, partial: Path) -> Manifest:
    copy = _Copy(store, partial / ARTIFACTS)
    registry = partial / REGISTRY
    for _ in range(1 + _TRIES):
        created_at = datetime.now(UTC)
        registry.unlink(missing_ok=True)
        _copy_state(database, registry)
        wanted, counts = _contents(registry)
        # A service may delete artifacts meanwhile; the next state of the database does not refer to them.
        gone = copy.fetch(wanted)
        if not gone:
            break
    else:
        tenant, uid, artifact = gone[0]
        raise BackupFailed(
            f"The artifact {artifact.name} of the adapter {uid} of {tenant} is missing, still after "
            f"{_TRIES} tries; `topwork doctor` says whether it is lost."
        )
    copy.finish(wanted)
    manifest = Manifest(
        form=FORM,
        schema=HEAD,
        created_at=created_at.isoformat(),
        registry_sha256=sha256_of(registry),
        counts=counts,
        artifacts=len(wanted),
        artifact_bytes=sum(artifact.length for _, _, artifact in wanted),
    )
    sync(registry)
    unfinished = partial / f"{MANIFEST}{PARTIAL}"
    unfinished.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    sync(unfinished)
    unfinished.rename(partial / MANIFEST)
    sync(partial)
    return manifest


def _copy_state(database: Database, path: Path) -> None:
    """Write one state of the database to a SQLite file."""
    path.touch(mode=0o600)
    if database.is_sqlite:
        database.copy_to(path)
        return
    copy = Database(f"sqlite:///{path}")
    try:
        copy.migrate()
        with database.reading() as source, copy.writing() as target:
            target.execute(delete(identity))
            for table in TABLES:
                copy_rows(source, target, table)
            raise_counters(target, counters(source))
    finally:
        copy.close()
    with closing(sqlite3.connect(path)) as connection:
        # DELETE mode leaves one file, without a WAL beside it.
        connection.execute("PRAGMA journal_mode = delete")


def _contents(path: Path) -> tuple[list[Reference], dict[str, int]]:
    """Return the artifacts that a copied state refers to, and the number of rows by table."""
    copy = Database(f"sqlite:///{path}")
    try:
        with copy.reading() as connection:
            counted = {table.name: select(func.count()).select_from(table) for table in TABLES}
            counts = {name: connection.execute(query).scalar_one() for name, query in counted.items()}
            return references(connection), counts
    finally:
        copy.close()


class _Copy:
    """The artifacts of a backup, copied first and synced at the end.

    Copying without syncing is quick, so fewer artifacts are deleted before they are copied.
    """

    def __init__(self, store: Store, root: Path) -> None:
        self._store = store
        self._root = root
        self._copied: set[Reference] = set()
        root.mkdir(mode=0o700)

    def fetch(self, wanted: Iterable[Reference]) -> list[Reference]:
        """Copy the artifacts that are not copied yet; return those that are missing. Raises BackupFailed."""
        new = [one for one in wanted if one not in self._copied]
        with ThreadPoolExecutor(_PARALLEL) as pool:
            there = list(pool.map(self._fetch, new))
        self._copied |= {one for one, found in zip(new, there, strict=True) if found}
        return [one for one, found in zip(new, there, strict=True) if not found]

    def _fetch(self, reference: Reference) -> bool:
        tenant, uid, artifact = reference
        try:
            data = self._store.read(tenant, uid, artifact)
        except MissingArtifact:
            return False
        except CorruptArtifact as error:
            raise BackupFailed(
                f"The artifact {artifact.name} of the adapter {uid} of {tenant} is damaged; "
                "`topwork doctor --repair` mends what can be mended."
            ) from error
        path = self._path(reference)
        for made in (path.parent.parent, path.parent):
            made.mkdir(mode=0o700, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
        return True

    def finish(self, wanted: Iterable[Reference]) -> None:
        """Remove copies that are no longer wanted, and sync the others and their folders."""
        for one in self._copied - set(wanted):
            path = self._path(one)
            path.unlink()
            for folder in (path.parent, path.parent.parent):
                with suppress(OSError):
                    folder.rmdir()
        paths = [self._path(one) for one in wanted]
        folders = {folder for path in paths for folder in (path.parent, path.parent.parent)}
        with ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(sync, [*paths, *folders, self._root]))

    def _path(self, reference: Reference) -> Path:
        tenant, uid, artifact = reference
        return self._root / object_key(tenant, uid, artifact.name)
