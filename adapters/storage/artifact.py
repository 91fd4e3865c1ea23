"""Artifact bytes: published atomically, verified on every read. The only builder of paths and object keys."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_UID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}(\.partial)?")
Buffer = bytes | bytearray
# What a publication is named until all its bytes are on the disk.
PARTIAL = ".partial"
# The object that names the database which the store belongs to.
IDENTITY = "identity"
# The prefix of what a sweep has put aside. No tenant can have this name.
ASIDE = "_aside"


class StoreError(RuntimeError):
    """The store refuses or fails; `code` is stable, the message tells a person what to do."""

    code = "store_error"


class CorruptArtifact(StoreError):
    """The stored bytes are not those that were published."""

    code = "corrupt_artifact"


class MissingArtifact(StoreError):
    """The stored bytes are not there."""

    code = "missing_artifact"


class StoreFull(StoreError):
    """There is no space left for artifacts or for the database; nothing was stored."""

    code = "store_full"


class StoreUnavailable(StoreError):
    """The disk or the bucket did not answer as it should."""

    code = "store_unavailable"


@dataclass(frozen=True, slots=True)
class Artifact:
    """Published bytes: their sha256 in hex, their length, and the nonce of this publication.

    The nonce makes each publication an object of its own. So deleting what one commit left unreferenced can
    never take away the same bytes that another process has just published and is about to commit.
    """

    sha256: str
    length: int
    nonce: str

    @property
    def name(self) -> str:
        """Name of the object inside its adapter."""
        return f"{self.sha256}-{self.nonce}"

    @classmethod
    def describe(cls, data: Buffer) -> Artifact:
        """A new artifact for the bytes, with a fresh nonce; nothing is stored."""
        return cls(hashlib.sha256(data).hexdigest(), len(data), secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as the store lists it: whose it is, its `Artifact.name`, and its age in seconds."""

    tenant: str
    adapter_uid: str
    name: str
    age: float


class Store(Protocol):
    """Artifacts of adapters, each inside its adapter's own prefix. Thread-safe, blocking: call from a thread.

    Every method raises ValueError for a tenant or uid that has not the form of one, and StoreUnavailable when
    the disk or the bucket fails otherwise than said below.
    """

    def publish(self, tenant: str, adapter_uid: str, data: Buffer) -> Artifact:
        """Store the bytes; when it returns they survive power loss. Raises StoreFull."""
        ...

    def publish_all(self, tenant: str, adapter_uid: str, blobs: Sequence[Buffer]) -> tuple[Artifact, ...]:
        """Store several at once, in less time than one by one. Raises StoreFull."""
        ...

    def put(self, tenant: str, adapter_uid: str, artifact: Artifact, data: Buffer) -> None:
        """Store again what was published once, under its very name, as durably as `publish` does.

        What is there of that name is replaced. Raises StoreFull, CorruptArtifact for other bytes.
        """
        ...

    def read(self, tenant: str, adapter_uid: str, artifact: Artifact) -> bytes:
        """The published bytes, length and sha256 verified. Raises MissingArtifact, CorruptArtifact."""
        ...

    def delete(self, tenant: str, adapter_uid: str, artifacts: Iterable[Artifact]) -> None:
        """Remove artifacts; one that is not there is no error."""
        ...

    def delete_adapter(self, tenant: str, adapter_uid: str) -> None:
        """Remove everything of the adapter, also what was put aside."""
        ...

    def delete_tenant(self, tenant: str) -> None:
        """Remove everything of the tenant, also of adapters that no row knows of, and what was put aside."""
        ...

    def objects(self, *, aside: bool = False) -> Iterator[StoredObject]:
        """Every stored object, those of one adapter together, and what interrupted publications left.

        aside: the objects that were put aside instead; their ages count from then.
        """
        ...

    def discard(self, objects: Collection[StoredObject], *, aside: bool = False) -> None:
        """Remove listed objects; one that is not there is no error."""
        ...

    def put_aside(self, objects: Collection[StoredObject]) -> None:
        """Move listed objects to where nothing reads them; one that is not there is no error."""
        ...

    def put_back(self, objects: Collection[StoredObject]) -> None:
        """Undo `put_aside`; one that is not there is no error."""
        ...

    @property
    def location(self) -> str:
        """The folder, or the bucket's URL."""
        ...

    def identity(self) -> str | None:
        """The identity of the database that the store belongs to; None before the first `claim`."""
        ...

    def claim(self, identity: str) -> None:
        """Write the identity, durably, unless the store has one already."""
        ...


def is_tenant(tenant: str) -> bool:
    """Whether the text can name a tenant: [a-z0-9][a-z0-9._-]{0,62}, like adapters' names."""
    return _TENANT.fullmatch(tenant) is not None


def tenant_key(tenant: str) -> str:
    """The prefix of a tenant's objects. Raises ValueError where the name could lead elsewhere."""
    if not is_tenant(tenant):
        raise ValueError(f"{tenant!r} cannot name a tenant: use [a-z0-9][a-z0-9._-], at most 63 characters")
    return tenant


def adapter_key(tenant: str, adapter_uid: str) -> str:
    """The prefix of an adapter's objects. Raises ValueError where either part could lead elsewhere."""
    if _UID.fullmatch(adapter_uid) is None:
        raise ValueError(f"{adapter_uid!r} is not an adapter's uid")
    return f"{tenant_key(tenant)}/{adapter_uid}"


def object_key(tenant: str, adapter_uid: str, name: str) -> str:
    """The key of an object. Raises ValueError where a part could lead elsewhere."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not an artifact's name")
    return f"{adapter_key(tenant, adapter_uid)}/{name}"


def parse_key(key: str) -> tuple[str, str, str] | None:
    """Tenant, uid and name of an object's key, or None for a key that is not one."""
    parts = key.split("/")
    if len(parts) != 3:
        return None
    tenant, uid, name = parts
    return (
        (tenant, uid, name) if is_tenant(tenant) and _UID.fullmatch(uid) and _NAME.fullmatch(name) else None
    )


def check(artifact: Artifact, data: Buffer) -> None:
    """Raises CorruptArtifact unless the bytes are the artifact's."""
    if len(data) != artifact.length or hashlib.sha256(data).hexdigest() != artifact.sha256:
        raise CorruptArtifact(f"The artifact {artifact.name} is damaged; restore a backup or adapt again.")


def verified(artifact: Artifact, data: bytes) -> bytes:
    """The bytes, if they are the artifact's. Raises CorruptArtifact."""
    check(artifact, data)
    return data


def missing(artifact: Artifact) -> MissingArtifact:
    """The error for an artifact that is not there."""
    return MissingArtifact(f"The artifact {artifact.name} is gone; restore a backup or adapt again.")
