"""The artifact store in a local folder: <root>/<tenant>/<adapter uid>/<sha256>-<nonce>."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.storage.artifact import (
    ASIDE,
    IDENTITY,
    PARTIAL,
    Artifact,
    Buffer,
    StoredObject,
    StoreFull,
    StoreUnavailable,
    adapter_key,
    check,
    missing,
    object_key,
    parse_key,
    tenant_key,
    verified,
)
from adapters.storage.files import entries_of, folders_in, remove_folder, sync, write_synced

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Attempts to publish; each deletion of the folder can cost one.
_ATTEMPTS = 20
_PAUSE = 0.005  # seconds, times the attempts so far
# Folder that holds folders while they are deleted. It is not a valid name for a tenant.
_DELETED = ".deleted"
_REMEMBERED_FOLDERS = 10_000


class LocalStore:
    """A Store in a local folder. Only the owner can read its folders and files."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._synced: set[str] = set()
        with _translated():
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for made in (self._root, *self._root.parents[:1]):
                sync(made)

    def publish(self, tenant: str, adapter_uid: str, data: Buffer) -> Artifact:
        return self.publish_all(tenant, adapter_uid, (data,))[0]

    def publish_all(self, tenant: str, adapter_uid: str, blobs: Sequence[Buffer]) -> tuple[Artifact, ...]:
        artifacts = tuple(Artifact.describe(data) for data in blobs)
        keys = [object_key(tenant, adapter_uid, artifact.name) for artifact in artifacts]

        def write() -> None:
            folder = self._make_folder(tenant, adapter_uid)
            self._write(folder, [self._root / key for key in keys], blobs)

        _persist(write)
        return artifacts

    def put(self, tenant: str, adapter_uid: str, artifact: Artifact, data: Buffer) -> None:
        check(artifact, data)
        path = self._root / object_key(tenant, adapter_uid, artifact.name)
        partial = path.with_name(path.name + PARTIAL)

        def write() -> None:
            folder = self._make_folder(tenant, adapter_uid)
            partial.unlink(missing_ok=True)
            try:
                write_synced(partial, data)
                partial.rename(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            sync(folder)

        _persist(write)

    def read(self, tenant: str, adapter_uid: str, artifact: Artifact) -> bytes:
        path = self._root / object_key(tenant, adapter_uid, artifact.name)
        with _translated():
            try:
                with path.open("rb") as file:
                    # One byte more than expected reveals a file that grew, without reading all of it.
                    data = file.read(artifact.length + 1)
            except FileNotFoundError:
                raise missing(artifact) from None
        return verified(artifact, data)

    def delete(self, tenant: str, adapter_uid: str, artifacts: Iterable[Artifact]) -> None:
        with _translated():
            for artifact in artifacts:
                (self._root / object_key(tenant, adapter_uid, artifact.name)).unlink(missing_ok=True)

    def delete_adapter(self, tenant: str, adapter_uid: str) -> None:
        key = adapter_key(tenant, adapter_uid)
        with _translated():
            for folder in (self._root / key, self._root / ASIDE / key):
                self._delete_folder(folder)
                # The last adapter to go takes the tenant's folder with it.
                with suppress(OSError):
                    folder.parent.rmdir()

    def delete_tenant(self, tenant: str) -> None:
        key = tenant_key(tenant)
        with _translated():
            for folder in (self._root / key, self._root / ASIDE / key):
                self._delete_folder(folder)

    def objects(self, *, aside: bool = False) -> Iterator[StoredObject]:
        now = time.time()
        with _translated():
            for folder in folders_in(self._base(aside)):
                for inner in folders_in(folder):
                    for file in entries_of(inner):
                        parsed = parse_key(f"{folder.name}/{inner.name}/{file.name}")
                        if parsed is None:
                            continue
                        with suppress(FileNotFoundError):
                            age = now - file.stat(follow_symlinks=False).st_mtime
                            yield StoredObject(*parsed, age=age)

    def discard(self, objects: Collection[StoredObject], *, aside: bool = False) -> None:
        base = self._base(aside)
        with _translated():
            for found in objects:
                (base / found.key).unlink(missing_ok=True)
        _remove_empty(base, objects)

    def put_aside(self, objects: Collection[StoredObject]) -> None:
        self._move(objects, self._base(False), self._base(True))

    def put_back(self, objects: Collection[StoredObject]) -> None:
        self._move(objects, self._base(True), self._base(False))

    @property
    def location(self) -> str:
        return str(self._root)

    @property
    def available(self) -> bool:
        return True

    def identity(self) -> str | None:
        with _translated():
            try:
                return (self._root / IDENTITY).read_text().strip()
            except FileNotFoundError:
                return None

    def claim(self, identity: str) -> None:
        path = self._root / IDENTITY
        # Processes that share a database start together, so each writes its own file.
        partial = path.with_name(f"{IDENTITY}-{secrets.token_hex(8)}{PARTIAL}")
        with _translated():
            try:
                write_synced(partial, identity.encode() + b"\n")
                # Unlike a rename, a link does not replace an existing file.
                with suppress(FileExistsError):
                    os.link(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            sync(self._root)

    def _base(self, aside: bool) -> Path:
        return self._root / ASIDE if aside else self._root

    def _move(self, objects: Collection[StoredObject], source: Path, target: Path) -> None:
        with _translated():
            for found in objects:
                path, goal = source / found.key, target / found.key
                goal.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with suppress(FileNotFoundError):
                    # The age restarts: an object moved there and back must not look like an old orphan.
                    os.utime(path)
                    path.rename(goal)
            for folder in {(target / found.key).parent for found in objects}:
                sync(folder)
        _remove_empty(source, objects)

    def _delete_folder(self, folder: Path) -> None:
        """Delete a folder, and what interrupted deletions left of others.

        The folder is moved first: deleting it in place would take file after file from publications.
        """
        deleted = self._root / _DELETED
        deleted.mkdir(mode=0o700, exist_ok=True)
        try:
            folder.rename(deleted / secrets.token_hex(8))
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # An overlay file system cannot move a folder of its lower layer.
            remove_folder(folder)
        for left in folders_in(deleted):
            remove_folder(left)

    def _make_folder(self, tenant: str, adapter_uid: str) -> Path:
        folder = self._root / adapter_key(tenant, adapter_uid)
        for path in (folder.parent, folder):
            try:
                path.mkdir(mode=0o700)
                made = True
            except FileExistsError:
                made = False
            # An earlier process may have been killed after it made a folder and before it synced it.
            if made or str(path) not in self._synced:
                sync(path.parent)
                if len(self._synced) >= _REMEMBERED_FOLDERS:
                    self._synced.clear()
                self._synced.add(str(path))
        return folder

    @staticmethod
    def _write(folder: Path, paths: Sequence[Path], blobs: Sequence[Buffer]) -> None:
        partial = [path.with_name(path.name + PARTIAL) for path in paths]
        try:
            # Each file is synced before its rename; the folder is synced once, after all of them.
            for path, data in zip(partial, blobs, strict=True):
                write_synced(path, data)
            for source, target in zip(partial, paths, strict=True):
                source.rename(target)
            sync(folder)
        except BaseException:
            for path in (*partial, *paths):
                with suppress(OSError):
                    path.unlink()
            raise


def _remove_empty(base: Path, objects: Collection[StoredObject]) -> None:
    for folder in {(base / found.key).parent for found in objects}:
        for empty in (folder, folder.parent):
            with suppress(OSError):
                empty.rmdir()


def _persist(write: Callable[[], None]) -> None:
    """Write, and write again if a deletion removed the folder between two steps.

    If the adapter was erased meanwhile, the commit is refused later.
    """
    with _translated():
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                write()
                break
            except FileNotFoundError:
                if attempt == _ATTEMPTS:
                    raise
            time.sleep(_PAUSE * attempt)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull("There is no space left for artifacts; make room, then try again.") from error
        raise StoreUnavailable(f"The artifact folder failed: {error.strerror or error}.") from error
