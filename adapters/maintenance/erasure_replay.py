"""Repeats erasures in a copy of an older state, so that a restore does not bring erased data back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

import numpy as np
from sqlalchemy import Connection, delete, insert, select, update

from adapters.adaptation.artifacts import rows_at
from adapters.adaptation.revision.layout import SegmentSlot, Stored, locate, plan_change
from adapters.registry.database import Database
from adapters.registry.erasures import ALL, delete_adapters, digest, pages_of
from adapters.registry.records import AdapterRecord, Change, ExampleRecord
from adapters.registry.schema import adapters, erasures, jobs, keys, replies, tenants
from adapters.registry.statements.commit import commit
from adapters.registry.statements.job_rows import OPEN
from adapters.registry.statements.queries import adapter_by_uid, example_records
from adapters.storage.artifact import Artifact, Buffer
from adapters.storage.formats import decode_embeddings, decode_inputs, encode_embeddings, encode_inputs


class Files(Protocol):
    """The part of Store that a replay uses to read artifacts and to publish rewritten ones."""

    def read(self, tenant: str, adapter_uid: str, artifact: Artifact) -> bytes: ...

    def publish(self, tenant: str, adapter_uid: str, data: Buffer) -> Artifact: ...


@dataclass(slots=True)
class Replayed:
    """Counts of what a replay erased or cancelled."""

    tenants: int = 0
    adapters: int = 0
    examples: int = 0
    jobs: int = 0
    # Tenant and name of adapters that lost their live version.
    without_live: set[tuple[str, str]] = field(default_factory=set)


def erasures_of(database: Database) -> dict[str, dict[str, Any]]:
    """Return all recorded erasures as rows, by id."""
    with database.reading() as connection:
        return {row.id: dict(row._mapping) for row in connection.execute(select(erasures))}


def replay(
    database: Database, files: Files, todo: Sequence[dict[str, Any]], replayed: Replayed | None = None
) -> Replayed:
    """Repeat these erasures in the database, oldest first, and record them there. Adds to `replayed`."""
    replayed = replayed or Replayed()
    for row in sorted(todo, key=lambda one: (one["at"], one["id"])):
        with database.writing() as connection:
            if row["adapter_uid"] is None:
                _tenant(connection, row["tenant"], row["at"], replayed)
            elif row["examples"] is None:
                replayed.adapters += delete_adapters(connection, [row["adapter_uid"]])["adapters"]
            else:
                _examples(connection, files, row, replayed)
            pages = pages_of(row["adapter_uid"], row["examples"])
            connection.execute(insert(erasures), [row | {"pages": pages}])
    return replayed


def _tenant(connection: Connection, tenant: str, at: datetime, replayed: Replayed) -> None:
    """Delete everything of the tenant that existed at the time `at`."""
    mine = select(adapters.c.uid).where(adapters.c.tenant == tenant, adapters.c.created_at <= at)
    replayed.adapters += delete_adapters(connection, connection.scalars(mine).all())["adapters"]
    for table, moment in ((jobs, jobs.c.created_at), (replies, replies.c.at), (keys, keys.c.created_at)):
        connection.execute(delete(table).where(table.c.tenant == tenant, moment <= at))
    if connection.scalar(select(keys.c.id).where(keys.c.tenant == tenant).limit(1)) is None:
        gone = delete(tenants).where(tenants.c.name == tenant, tenants.c.created_at <= at)
        replayed.tenants += connection.execute(gone).rowcount


def _examples(connection: Connection, files: Files, row: dict[str, Any], replayed: Replayed) -> None:
    uid, at = row["adapter_uid"], row["at"]
    if connection.scalar(select(adapters.c.uid).where(adapters.c.uid == uid)) is None:
        return
    # Uploads of unfinished jobs, and stored replies, may hold erased examples.
    unfinished = jobs.c.state.in_(OPEN) & (jobs.c.kind == "bulk_adapt")
    ended = update(jobs).where(jobs.c.adapter_uid == uid, unfinished, jobs.c.created_at <= at)
    values = {"state": "cancelled", "lease_until": None, "finished_at": at}
    replayed.jobs += connection.execute(ended.values(values)).rowcount
    connection.execute(delete(replies).where(replies.c.adapter_uid == uid, replies.c.at <= at))
    kept = example_records(connection, uid)
    digests = set(row["examples"].split(","))
    if row["examples"] == ALL:
        removals = [one.id for one in kept if one.created_at <= at]
    else:
        removals = [one.id for one in kept if digest(one.id) in digests]
    if not removals:
        return
    adapter = adapter_by_uid(connection, uid)
    committed = commit(connection, _change(files, adapter, kept, removals))
    # The commit recorded a new erasure. `replay` records the original one in its place.
    connection.execute(delete(erasures).where(erasures.c.id == committed.erasure))
    replayed.examples += len(removals)
    if adapter.live is not None and committed.adapter.live is None:
        replayed.without_live.add((adapter.tenant, adapter.name))


def _change(
    files: Files, adapter: AdapterRecord, kept: Sequence[ExampleRecord], removals: Sequence[str]
) -> Change:
    """Rewrite the files that hold the examples, and return the change that removes them."""
    plan = plan_change(kept, (), removals=removals)
    starts = [_rewrite(files, adapter, bundle) for bundle in plan.bundles]
    _, repoints = locate(plan, None, starts)
    return Change(
        tenant=adapter.tenant,
        name=adapter.name,
        uid=adapter.uid,
        revision=adapter.revision,
        removals=tuple(removals),
        repoints=repoints,
    )


def _rewrite(files: Files, adapter: AdapterRecord, bundle: Sequence[Stored]) -> SegmentSlot:
    """Copy the rows of a bundle to new files, in order; return the place of the first."""
    tenant, uid = adapter.tenant, adapter.uid

    def read(file: Artifact) -> bytes:
        return files.read(tenant, uid, file)

    moved = rows_at([(one.segment, one.row) for one in bundle], read, decode_embeddings)
    segment = files.publish(tenant, uid, encode_embeddings(np.stack(moved), adapter.fingerprint))
    kept = [(one.inputs, one.row) for one in bundle if one.inputs is not None]
    if not kept:
        return SegmentSlot(segment, 0, None)
    values = rows_at(kept, read, decode_inputs)
    return SegmentSlot(segment, 0, files.publish(tenant, uid, encode_inputs(values)))
