"""The artifact store: bytes are published atomically and verified on every read.

Paths and object keys are built in this module only.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from models.errors import DomainError, InternalFailure, StorageFull, Unavailable

_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_UID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}(\.partial)?")
Buffer = bytes | bytearray
# Suffix of a publication's name until all its bytes are on the disk.
PARTIAL = ".partial"
# Name of the object with the identity of the database that the store belongs to.
IDENTITY = "identity"
# Prefix of objects that a sweep has put aside. It is not a valid name for a tenant.
ASIDE = "_aside"


class StoreError(DomainError):
    """The store refuses or fails."""


class CorruptArtifact(StoreError, InternalFailure):
    """The stored bytes differ from those that were published."""

    code = "corrupt_artifact"


class MissingArtifact(StoreError, InternalFailure):
    """The stored bytes are missing."""

    code = "missing_artifact"


class StoreFull(StoreError, StorageFull):
    """No space is left for artifacts or for the database; nothing was stored."""

    code = "store_full"


class StoreUnavailable(StoreError, Unavailable):
    """The disk or the bucket failed or did not answer."""

    code = "store_unavailable"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A reference to published bytes.

    The nonce makes each publication a separate object, so deleting what one commit left unreferenced cannot
    remove the same bytes that another process has just published and is about to commit.
    """

    sha256: str  # in hex
    length: int  # in bytes
    nonce: str  # 16 hex digits, unique to this publication

    @property
    def name(self) -> str:
        """The name of the object within its adapter."""
        return f"{self.sha256}-{self.nonce}"

    @classmethod
    def describe(cls, data: Buffer) -> Artifact:
        """Return a new artifact for the bytes, with a fresh nonce; nothing is stored."""
        return cls(hashlib.sha256(data).hexdigest(), len(data), secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as the store lists it."""

    tenant: str
    adapter_uid: str
    name: str  # Artifact.name, with the suffix PARTIAL if the publication is not complete
    age: float  # seconds

    @property
    def key(self) -> str:
        """The key under which the store has it."""
        return object_key(self.tenant, self.adapter_uid, self.name)


class Store(Protocol):
    """Stores artifacts, each under the prefix of its adapter. Thread-safe and blocking: call from a thread.

    Every method raises ValueError for a malformed tenant or uid, and StoreUnavailable if the disk or the
    bucket fails in a way that the method does not name.
    """

    def publish(self, tenant: str, adapter_uid: str, data: Buffer) -> Artifact:
        """Store the bytes; on return they survive a power loss. Raises StoreFull."""
        ...

    def publish_all(self, tenant: str, adapter_uid: str, blobs: Sequence[Buffer]) -> tuple[Artifact, ...]:
        """Store several blobs at once, faster than one by one. Raises StoreFull."""
        ...

    def put(self, tenant: str, adapter_uid: str, artifact: Artifact, data: Buffer) -> None:
        """Store a published artifact again, under the same name and as durably as `publish` does.

        Replaces an object of that name. Raises StoreFull, and CorruptArtifact for other bytes.
        """
        ...

    def read(self, tenant: str, adapter_uid: str, artifact: Artifact) -> bytes:
        """Return the published bytes, length and sha256 verified. Raises MissingArtifact, CorruptArtifact."""
        ...

    def delete(self, tenant: str, adapter_uid: str, artifacts: Iterable[Artifact]) -> None:
        """Delete artifacts; missing ones are ignored."""
        ...

    def delete_adapter(self, tenant: str, adapter_uid: str) -> None:
        """Delete all objects of the adapter, including those put aside."""
        ...

    def delete_tenant(self, tenant: str) -> None:
        """Delete all objects of the tenant, including those of adapters without a row and those put aside."""
        ...

    def objects(self, *, aside: bool = False) -> Iterator[StoredObject]:
        """Yield every stored object, adapter by adapter, including what interrupted publications left.

        `aside`: yield the objects that were put aside instead; their ages count from then.
        """
        ...

    def discard(self, objects: Collection[StoredObject], *, aside: bool = False) -> None:
        """Delete listed objects; missing ones are ignored."""
        ...

    def put_aside(self, objects: Collection[StoredObject]) -> None:
        """Move listed objects to where nothing reads them; missing ones are ignored."""
        ...

    def put_back(self, objects: Collection[StoredObject]) -> None:
        """Undo `put_aside`; missing objects are ignored."""
        ...

    @property
    def location(self) -> str:
        """The folder, or the bucket's URL."""
        ...

    @property
    def available(self) -> bool:
        """False while calls are refused because the bucket does not answer. A folder is always available."""
        ...

    def identity(self) -> str | None:
        """Return the identity of the database that the store belongs to; None before the first `claim`."""
        ...

    def claim(self, identity: str) -> None:
        """Write the identity durably, unless the store already has one."""
        ...


def is_tenant(tenant: str) -> bool:
    """Whether the text is a valid tenant name: [a-z0-9][a-z0-9._-]{0,62}, as for adapters."""
    return _TENANT.fullmatch(tenant) is not None


def tenant_key(tenant: str) -> str:
    """Return the prefix of a tenant's objects. Raises ValueError if the name is not valid."""
    if not is_tenant(tenant):
        raise ValueError(f"{tenant!r} cannot name a tenant: use [a-z0-9][a-z0-9._-], at most 63 characters")
    return tenant


def adapter_key(tenant: str, adapter_uid: str) -> str:
    """Return the prefix of an adapter's objects. Raises ValueError if either part is not valid."""
    if _UID.fullmatch(adapter_uid) is None:
        raise ValueError(f"{adapter_uid!r} is not an adapter's uid")
    return f"{tenant_key(tenant)}/{adapter_uid}"


def object_key(tenant: str, adapter_uid: str, name: str) -> str:
    """Return the key of an object. Raises ValueError if a part is not valid and could lead elsewhere."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not an artifact's name")
    return f"{adapter_key(tenant, adapter_uid)}/{name}"


def parse_key(key: str) -> tuple[str, str, str] | None:
    """Return tenant, uid and name of an object's key, or None if the key is not an object's."""
    parts = key.split("/")
    if len(parts) != 3:
        return None
    tenant, uid, name = parts
    return (
        (tenant, uid, name) if is_tenant(tenant) and _UID.fullmatch(uid) and _NAME.fullmatch(name) else None
    )


def check(artifact: Artifact, data: Buffer) -> None:
    """Raise CorruptArtifact unless the bytes are the artifact's."""
    if len(data) != artifact.length or hashlib.sha256(data).hexdigest() != artifact.sha256:
        raise CorruptArtifact(f"The artifact {artifact.name} is damaged. Restore a backup, or adapt again.")


def verified(artifact: Artifact, data: bytes) -> bytes:
    """Return the bytes if they are the artifact's. Raises CorruptArtifact."""
    check(artifact, data)
    return data


def missing(artifact: Artifact) -> MissingArtifact:
    """Return the error for an artifact that is not there."""
    return MissingArtifact(f"The artifact {artifact.name} is missing. Restore a backup, or adapt again.")
