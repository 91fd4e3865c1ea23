"""The transactions that write a Change, promote a version, and delete an adapter."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from adapters.registry.erasures import Receipt, check_not_erased, erase_adapter, erase_examples
from adapters.registry.errors import AdapterExists, AliasMoved, RevisionMoved
from adapters.registry.quotas import check_adapters, check_examples
from adapters.registry.records import AdapterRecord, Change, Claim, Committed, VersionRecord
from adapters.registry.schema import adapters, database_now, tenants, versions
from adapters.registry.statements.changes import announce
from adapters.registry.statements.job_rows import end, held
from adapters.registry.statements.queries import (
    adapter_by_name,
    adapter_by_uid,
    alias_of,
    current_time,
    microseconds,
    version_record,
)
from adapters.registry.statements.retention import (
    check_erased,
    drop_fitted_on,
    prune,
    release,
)
from adapters.registry.statements.revision_rows import (
    artifact_numbers,
    artifacts_of,
    previous_of,
    record_version,
    write_examples,
)


def commit(connection: Connection, change: Change) -> Committed:
    """Write the change, in a writing transaction. See Registry.commit."""
    _check(change)
    adapter = _create(connection, change) if change.create else _locked(connection, change)
    now = current_time(connection)
    wanted = _wanted(change, adapter)
    touches = bool(change.clear_first or change.upserts or change.removals or change.repoints or wanted)
    revision = adapter.revision + touches
    previous = previous_of(connection, change)
    numbers = artifact_numbers(connection, adapter.uid, artifacts_of(change))
    added = write_examples(connection, change, previous, numbers, revision, now)
    gone, released = drop_fitted_on(connection, adapter.uid, change.removals, previous)
    live = None if adapter.live in gone else adapter.live
    if change.fallback is not None:
        live = _staying(connection, adapter, change.fallback)

    number: int | None = None
    if change.version is not None:
        number = record_version(connection, adapter, change, change.version, numbers, revision, now)
        live = number if change.promote else live
    pruned, more_released = prune(connection, adapter.uid, live)
    unreferenced = release(connection, previous.released | released | more_released)
    erasure: str | None = None
    if change.removals:
        check_erased(connection, change.removals, previous)
        erasure = erase_examples(connection, adapter, change.removals).id

    if change.clear_first:
        total, removed = len(change.upserts), len(previous.used) - (len(change.upserts) - added)
    else:
        total, removed = adapter.examples + added - len(change.removals), len(change.removals)
    values: dict[str, Any] = {"revision": revision, "live": live, "examples": total, **wanted}
    if change.promote or change.restores or live is None:
        values["rolled_back_at"] = None
    if change.restores:
        values["restored_at"] = now
    if change.rebase is not None:
        values |= {"backbone": change.rebase.backbone, "fingerprint": change.rebase.fingerprint}
    after = update_adapter(connection, adapter, values, gone=erasure is not None)
    if added:
        check_examples(connection, adapter.tenant)
    return Committed(
        adapter=after,
        alias=alias_of(connection, after),
        version=None if number is None else version_record(connection, after.uid, number),
        added=added,
        replaced=len(change.upserts) - added,
        removed=removed,
        gone=tuple(sorted(gone | pruned)),
        unreferenced=unreferenced,
        erasure=erasure,
        erased=tuple(sorted(gone)),
    )


def commit_job(connection: Connection, change: Change, claim: Claim) -> Committed:
    """Write a change made by a job; if it has a version, the job has succeeded. See Registry.commit."""
    # The adapter's row is locked before the job's, as in a deletion, to avoid a deadlock.
    query = select(adapters.c.uid).where(adapters.c.uid == claim.job.adapter_uid)
    connection.execute(query.with_for_update())
    held(connection, claim)
    if change.uid != claim.job.adapter_uid:
        raise ValueError("the change is to another adapter than the job's")
    committed = commit(connection, change)
    if committed.version is not None:
        end(connection, claim, "succeeded", version=committed.version.number)
    return committed


def promote(connection: Connection, uid: str, number: int, if_match: str | None) -> Committed:
    """Point `live` at the version, in a writing transaction. See Registry.promote."""
    adapter = adapter_by_uid(connection, uid, lock=True)
    if if_match is not None and if_match != adapter.etag:
        raise AliasMoved(
            f"Version {adapter.live} is live now, not the one in If-Match. Read the adapter again."
        )
    version = version_record(connection, uid, number)
    released: set[int] = set()
    gone: set[int] = set()
    standing = number, _rolled_back_at(connection, adapter, version)
    if adapter.standing != standing:
        # The previously live version may have been kept only because it was live.
        connection.execute(update(adapters).where(adapters.c.uid == uid).values(live=number))
        gone, released = prune(connection, uid, number)
        adapter = update_adapter(connection, adapter, {"live": number, "rolled_back_at": standing[1]})
    return Committed(
        adapter=adapter,
        alias=alias_of(connection, adapter),
        version=version,
        added=0,
        replaced=0,
        removed=0,
        gone=tuple(sorted(gone)),
        unreferenced=release(connection, released),
    )


def delete_adapter(connection: Connection, tenant: str, name: str) -> tuple[Receipt, str]:
    """Delete all rows of the adapter. See Registry.delete_adapter."""
    receipt, uid = erase_adapter(connection, tenant, name)
    announce(connection, tenant, name, gone=True)
    return receipt, uid


def _check(change: Change) -> None:
    """Raises ValueError for a change that contradicts itself, which no caller should send."""
    ids = [example.id for example in change.upserts]
    ids += [*change.removals, *(example.id for example in change.repoints)]
    if len(set(ids)) != len(ids):
        raise ValueError("a change names an example twice")
    if change.create is not None and (
        change.revision or change.clear_first or change.removals or change.repoints
    ):
        raise ValueError("an adapter that is to be created has no revision and no examples")
    if change.clear_first and (change.removals or change.repoints):
        raise ValueError("clear_first leaves no examples to remove or to repoint")
    if change.promote and change.version is None:
        raise ValueError("there is no version to promote")
    if change.promote and change.fallback is not None:
        raise ValueError("two versions cannot be live")


def _create(connection: Connection, change: Change) -> AdapterRecord:
    assert change.create is not None
    created = change.create
    values = {
        "uid": change.uid,
        "tenant": change.tenant,
        "name": change.name,
        "backbone": created.backbone,
        "fingerprint": created.fingerprint,
        "kind": created.kind,
        "task": created.task,
        "keep_inputs": created.keep_inputs,
        "answer_accuracy": created.answer_accuracy,
        "weights": created.weights,
        "meanings": dict(created.meanings),
        "costs": dict(created.costs),
        "revision": 0,
        "next_version": 1,
        "epoch": 0,
        "examples": 0,
        "created_at": database_now(),
    }
    check_not_erased(connection, change.tenant, time.monotonic() - created.began)
    _add_tenant(connection, change.tenant)
    check_adapters(connection, change.tenant)
    try:
        connection.execute(insert(adapters).values(values))
    except IntegrityError as error:
        raise AdapterExists(
            f"Another request has just created the adapter {change.name!r}. Send the request again."
        ) from error
    return adapter_by_uid(connection, change.uid)


def _add_tenant(connection: Connection, name: str) -> None:
    """Add the tenant's row unless it exists."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    values = dialect.insert(tenants).values(name=name, created_at=database_now())
    connection.execute(values.on_conflict_do_nothing())


def _locked(connection: Connection, change: Change) -> AdapterRecord:
    adapter = adapter_by_name(connection, change.tenant, change.name, lock=True)
    if adapter.uid != change.uid or adapter.revision != change.revision:
        raise RevisionMoved(f"The examples of {change.name!r} changed during the request. Send it again.")
    if change.standing not in (None, adapter.standing):
        raise RevisionMoved(f"`live` of {change.name!r} changed during the request. Send it again.")
    return adapter


def _rolled_back_at(
    connection: Connection, adapter: AdapterRecord, version: VersionRecord
) -> datetime | None:
    """Return since when a rollback is in force if a person makes the version live; None if there is none.

    A version fitted after a rollback ends it, even if newer versions exist: its examples have been judged.
    """
    newest = select(func.max(versions.c.number)).where(versions.c.adapter_uid == adapter.uid)
    before = adapter.rolled_back_at
    if version.number == connection.scalar(newest) or (before is not None and version.created_at > before):
        return None
    return before if before is not None and version.number == adapter.live else current_time(connection)


def _wanted(change: Change, adapter: AdapterRecord) -> dict[str, Any]:
    """Return the fitting options that the change replaces."""
    asked = {
        "answer_accuracy": change.answer_accuracy,
        "weights": change.weights,
        "meanings": None if change.meanings is None else dict(change.meanings),
        "costs": None if change.costs is None else dict(change.costs),
    }
    return {
        name: value for name, value in asked.items() if value is not None and value != getattr(adapter, name)
    }


def _staying(connection: Connection, adapter: AdapterRecord, number: int) -> int:
    """Return the number. Raises RevisionMoved if that version no longer exists."""
    query = select(versions.c.number).where(versions.c.adapter_uid == adapter.uid)
    if connection.execute(query.where(versions.c.number == number)).first() is None:
        raise RevisionMoved(
            f"Version {number} of {adapter.name!r} was deleted during the request. Send it again."
        )
    return number


def update_adapter(
    connection: Connection, adapter: AdapterRecord, values: dict[str, Any], *, gone: bool = False
) -> AdapterRecord:
    """Write the values to the adapter's row, with its next epoch, and announce the change."""
    now = announce(connection, adapter.tenant, adapter.name, gone=gone)
    epoch = next_epoch(adapter.epoch, now)
    connection.execute(update(adapters).where(adapters.c.uid == adapter.uid).values(**values, epoch=epoch))
    return adapter_by_uid(connection, adapter.uid)


def next_epoch(last: int, now: datetime) -> int:
    """Return the epoch after `last`: the time, in microseconds since 1970, or last + 1 if that is later.

    It grows with every change even if the clock goes back, and reveals nothing about other adapters.
    """
    return max(last + 1, microseconds(now))
