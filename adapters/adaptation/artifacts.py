"""Files before rows: what is published for a change is deleted again if the change is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from adapters.registry.errors import RegistryUnavailable, UnknownVersion
from adapters.registry.records import AdapterRecord
from adapters.registry.registry import Registry
from adapters.storage.artifact import Artifact, CorruptArtifact, MissingArtifact, Store, StoreError
from adapters.storage.formats import Evidence, decode_evidence
from models.arrays import Floats

logger = logging.getLogger("topwork")


@contextmanager
def kept_if_committed(store: Store, tenant: str, uid: str, files: Iterable[Artifact]) -> Iterator[None]:
    """Delete the published files if the block, which commits rows that refer to them, raises an error."""
    try:
        yield
    except RegistryUnavailable:
        # The change may have been committed all the same; if not, a sweep finds the files.
        raise
    except Exception:
        delete_unreferenced(store, tenant, uid, files)
        raise


def delete_unreferenced(store: Store, tenant: str, uid: str, files: Iterable[Artifact]) -> None:
    """Delete files to which no row refers; those that cannot be deleted now are swept later."""
    try:
        store.delete(tenant, uid, files)
    except StoreError as error:
        logger.warning("unreferenced artifacts stay until the next sweep: %s", error)


def rows_at(
    places: Sequence[tuple[Artifact, int]],
    read: Callable[[Artifact], bytes],
    decode: Callable[[bytes], Sequence[Any] | Floats],
) -> list[Any]:
    """Return the row at each place: a file, and a row in it. Each file is read once."""
    files = {file: decode(read(file)) for file in dict.fromkeys(file for file, _ in places)}
    return [files[file][row] for file, row in places]


def evidence_of(
    registry: Registry, store: Store, adapter: AdapterRecord, number: int | None
) -> Evidence | None:
    """Return the evidence of a version; None if there is no such version, or its evidence is lost."""
    file = evidence_file(registry, adapter, number)
    return None if file is None else evidence_in(store, adapter, file)


def evidence_file(registry: Registry, adapter: AdapterRecord, number: int | None) -> Artifact | None:
    """Return the file with the evidence of a version; None if there is no such version."""
    try:
        return None if number is None else registry.version(adapter.uid, number).evidence
    except UnknownVersion:
        # The version has just been deleted; if its adapter was too, the commit fails.
        return None


def evidence_in(store: Store, adapter: AdapterRecord, file: Artifact) -> Evidence | None:
    """Return the evidence in a file; None if it is lost."""
    try:
        return decode_evidence(store.read(adapter.tenant, adapter.uid, file))
    except (MissingArtifact, CorruptArtifact) as error:
        # A failed comparison must not keep a tenant from adapting.
        logger.warning("no comparison with a version of %s: %s", adapter.name, error)
        return None
