"""Repairs of an adapter's rows, for files that are lost or counters that are wrong."""

from __future__ import annotations

from sqlalchemy import Connection, func, select, update

from adapters.registry.schema import adapters, examples, versions
from adapters.registry.statements.commit import update_adapter
from adapters.registry.statements.queries import adapter_by_uid
from adapters.registry.statements.retention import delete_versions, release
from adapters.storage.artifact import Artifact


def drop_versions(connection: Connection, uid: str, numbers: set[int]) -> tuple[Artifact, ...]:
    """Delete damaged versions; return the artifacts that are no longer referenced.

    If the live version is missing, the newest remaining one becomes live; under a rollback, the newest older
    one. Call it in a writing transaction. Raises UnknownAdapter.
    """
    adapter = adapter_by_uid(connection, uid, lock=True)
    _, released = delete_versions(connection, uid, numbers)
    left = set(connection.scalars(select(versions.c.number).where(versions.c.adapter_uid == uid)))
    live, held = adapter.standing
    if live is not None and live not in left:
        # Under a rollback, a newer version becomes live only if no older one is left.
        older = {number for number in left if number < live}
        live = max(older if held and older else left, default=None)
        held = held if older else None
    update_adapter(connection, adapter, {"live": live, "rolled_back_at": held})
    return release(connection, released)


def drop_evidence(connection: Connection, uid: str, numbers: set[int]) -> tuple[Artifact, ...]:
    """Remove lost evidence from versions; return the artifacts that are no longer referenced.

    Call it in a writing transaction. Raises UnknownAdapter.
    """
    adapter = adapter_by_uid(connection, uid, lock=True)
    which = (versions.c.adapter_uid == uid) & versions.c.number.in_(numbers)
    released = set(connection.scalars(select(versions.c.evidence_id).where(which))) - {None}
    connection.execute(update(versions).where(which).values(evidence_id=None))
    update_adapter(connection, adapter, {})
    return release(connection, {number for number in released if number is not None})


def recount(connection: Connection, uid: str) -> tuple[Artifact, ...]:
    """Recompute the adapter's counters from its rows; return no artifacts, as none become unreferenced.

    Call it in a writing transaction. Raises UnknownAdapter.
    """
    adapter = adapter_by_uid(connection, uid, lock=True)
    mine = adapters.c.uid == uid
    kept = connection.scalar(select(func.count()).where(examples.c.adapter_uid == uid))
    highest = connection.scalar(select(func.max(versions.c.number)).where(versions.c.adapter_uid == uid)) or 0
    low = mine & (adapters.c.next_version <= highest)
    connection.execute(update(adapters).where(low).values(next_version=highest + 1))
    update_adapter(connection, adapter, {"examples": kept})
    return ()
