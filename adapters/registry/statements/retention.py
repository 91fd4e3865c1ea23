"""Deletes versions, and the artifacts that are no longer referenced."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import Connection, delete, exists, or_, select

from adapters.registry.errors import KEPT_VERSIONS
from adapters.registry.schema import artifacts, examples, versions
from adapters.registry.statements.queries import Used, chunks
from adapters.storage.artifact import Artifact


@dataclass(frozen=True, slots=True)
class Previous:
    """The state of the changed examples before the change, by example id."""

    used: dict[str, Used] = field(default_factory=dict)  # the revisions in which it was in use
    # Digest of its input, and creation time.
    created: dict[str, tuple[str, datetime]] = field(default_factory=dict)
    # Artifact ids and rows of its embedding and input.
    places: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    released: set[int] = field(default_factory=set)  # ids of artifacts that may be unreferenced afterwards


def drop_fitted_on(
    connection: Connection, uid: str, removals: Collection[str], previous: Previous
) -> tuple[set[int], set[int]]:
    """Delete the versions that learned from a removed example. Returns as `delete_versions` does."""
    if not removals:
        return set(), set()
    used = {previous.used[name] for name in removals}
    query = select(versions.c.number, versions.c.revision).where(versions.c.adapter_uid == uid)
    found = connection.execute(query).all()
    learned = {number for number, revision in found if any(one.taught(revision) for one in used)}
    return delete_versions(connection, uid, learned)


def prune(connection: Connection, uid: str, live: int | None) -> tuple[set[int], set[int]]:
    """Delete all but the live and the newest KEPT_VERSIONS versions. Returns as `delete_versions` does."""
    query = select(versions.c.number).where(versions.c.adapter_uid == uid).order_by(versions.c.number.desc())
    return delete_versions(connection, uid, set(connection.scalars(query.offset(KEPT_VERSIONS))) - {live})


def delete_versions(connection: Connection, uid: str, numbers: set[int]) -> tuple[set[int], set[int]]:
    """Delete these versions; return their numbers, and the row ids of the artifacts that they used."""
    if not numbers:
        return set(), set()
    doomed = (versions.c.adapter_uid == uid) & versions.c.number.in_(numbers)
    stored = select(versions.c.artifact_id, versions.c.evidence_id, versions.c.network_id)
    rows = connection.execute(stored.where(doomed)).all()
    connection.execute(delete(versions).where(doomed))
    return numbers, {number for row in rows for number in row if number is not None}


def release(connection: Connection, candidates: Collection[int]) -> tuple[Artifact, ...]:
    """Delete the rows of those artifacts that are no longer referenced; return the artifacts."""
    free: dict[int, Artifact] = {}
    used = or_(
        exists().where(examples.c.segment_id == artifacts.c.id),
        exists().where(examples.c.inputs_id == artifacts.c.id),
        exists().where(versions.c.artifact_id == artifacts.c.id),
        exists().where(versions.c.evidence_id == artifacts.c.id),
        exists().where(versions.c.network_id == artifacts.c.id),
    )
    query = select(artifacts.c.id, artifacts.c.sha256, artifacts.c.length, artifacts.c.nonce).where(~used)
    for chunk in chunks(candidates):
        for number, sha256, length, nonce in connection.execute(query.where(artifacts.c.id.in_(chunk))):
            free[number] = Artifact(sha256, length, nonce)
    for chunk in chunks(free):
        connection.execute(delete(artifacts).where(artifacts.c.id.in_(chunk)))
    return tuple(free.values())


def check_erased(connection: Connection, removals: Iterable[str], previous: Previous) -> None:
    """Raises ValueError if a removal would leave the removed bytes in a file that is still in use."""
    places = {place for name in removals for place in previous.places[name]}
    used: set[tuple[int, int]] = set()
    for chunk in chunks({stored for stored, _ in places}):
        for column in (examples.c.segment_id, examples.c.inputs_id):
            rows = connection.execute(select(column, examples.c.row).where(column.in_(chunk)).distinct())
            used |= {(stored, row) for stored, row in rows}
    in_use = {stored for stored, _ in used}
    # A row that a remaining example shares may stay.
    if any(stored in in_use and (stored, row) not in used for stored, row in places):
        raise ValueError("a removed example's file is still in use: repoint its other examples to a new one")
