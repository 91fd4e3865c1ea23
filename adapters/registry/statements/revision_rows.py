"""Rows of a revision: examples, the version, and the files they refer to."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select, tuple_, update

from adapters.registry.errors import UnknownExample
from adapters.registry.records import AdapterRecord, Change, ExampleWrite, NewVersion, Repoint
from adapters.registry.schema import adapters, artifacts, encode_target, examples, versions
from adapters.registry.statements.queries import Used, chunks
from adapters.registry.statements.retention import Previous
from adapters.registry.statements.row_sets import all_rows, insert_rows, update_rows
from adapters.storage.artifact import Artifact


def artifacts_of(change: Change) -> set[Artifact]:
    """The artifacts that a change refers to."""
    found: set[Artifact | None] = set()
    for example in placed(change):
        found |= {example.segment, example.inputs}
    if change.version is not None:
        found |= {change.version.artifact, change.version.evidence, change.version.network}
    return {artifact for artifact in found if artifact is not None}


def artifact_numbers(connection: Connection, uid: str, wanted: Collection[Artifact]) -> dict[Artifact, int]:
    """Return the row ids of the artifacts; rows are inserted for those that the adapter lacks."""

    def known(some: Iterable[Artifact]) -> dict[Artifact, int]:
        query = select(artifacts.c.id, artifacts.c.sha256, artifacts.c.length, artifacts.c.nonce)
        keys = [(artifact.sha256, artifact.nonce) for artifact in some]
        rows: dict[Artifact, int] = {}
        for chunk in chunks(keys, 1000):
            narrowed = query.where(
                artifacts.c.adapter_uid == uid, tuple_(artifacts.c.sha256, artifacts.c.nonce).in_(chunk)
            )
            for number, sha256, length, nonce in connection.execute(narrowed):
                rows[Artifact(sha256, length, nonce)] = number
        return rows

    numbers = known(wanted)
    new = [artifact for artifact in wanted if artifact not in numbers]
    if new:
        rows = [
            {
                "adapter_uid": uid,
                "sha256": artifact.sha256,
                "nonce": artifact.nonce,
                "length": artifact.length,
            }
            for artifact in new
        ]
        connection.execute(insert(artifacts), rows)
        numbers |= known(new)
    return numbers


def previous_of(connection: Connection, change: Change) -> Previous:
    """What the database holds of the examples that a change names."""
    query = select(
        examples.c.id,
        examples.c.first_revision,
        examples.c.excluded_since,
        examples.c.digest,
        examples.c.created_at,
        examples.c.segment_id,
        examples.c.inputs_id,
        examples.c.row,
    ).where(examples.c.adapter_uid == change.uid)
    if change.clear_first:
        rows = list(all_rows(connection, query))
    else:
        ids = [*(example.id for example in placed(change)), *change.removals]
        rows = [
            row
            for chunk in chunks(ids)
            for row in all_rows(connection, query.where(examples.c.id.in_(chunk)))
        ]
    previous = Previous()
    for name, first_revision, excluded_since, digest, created_at, segment, inputs, row in rows:
        previous.used[name] = Used(first_revision, excluded_since)
        previous.created[name] = digest, created_at
        previous.places[name] = [(stored, row) for stored in (segment, inputs) if stored is not None]
        previous.released.update(stored for stored, _ in previous.places[name])
    for name in (*change.removals, *(example.id for example in change.repoints)):
        if name not in previous.used:
            raise UnknownExample(name)
    return previous


def write_examples(
    connection: Connection,
    change: Change,
    previous: Previous,
    numbers: dict[Artifact, int],
    revision: int,
    now: datetime,
) -> int:
    """Delete, insert and repoint examples; return the number of upserts that are new to the adapter."""
    mine = examples.c.adapter_uid == change.uid
    known = [example.id for example in change.upserts if example.id in previous.used]
    if change.clear_first:
        connection.execute(delete(examples).where(mine))
    else:
        for chunk in chunks([*known, *change.removals]):
            connection.execute(delete(examples).where(mine, examples.c.id.in_(chunk)))
    if change.upserts:
        rows: list[dict[str, Any]] = []
        for example in change.upserts:
            first, until = previous.used.get(example.id, (revision, None))
            digest, created_at = previous.created.get(example.id, ("", now))
            rows.append(
                {
                    "adapter_uid": change.uid,
                    "id": example.id,
                    "digest": example.digest,
                    "target": encode_target(example.target),
                    "segment_id": numbers[example.segment],
                    "row": example.row,
                    "inputs_id": None if example.inputs is None else numbers[example.inputs],
                    "first_revision": first,
                    # An example with the same input remains the same example, even if its target changes.
                    "created_at": created_at if example.digest == digest else now,
                    "group": example.group,
                    "sampled": example.sampled,
                    "excluded_since": (until or revision) if example.excluded else None,
                }
            )
        insert_rows(connection, examples, rows)
    if change.repoints:
        moved = [
            {
                "id": example.id,
                "segment_id": numbers[example.segment],
                "row": example.row,
                "inputs_id": None if example.inputs is None else numbers[example.inputs],
            }
            for example in change.repoints
        ]
        columns = (examples.c.segment_id, examples.c.row, examples.c.inputs_id)
        update_rows(connection, update(examples).where(mine), examples.c.id, columns, moved)
    return len(change.upserts) - len(known)


def record_version(
    connection: Connection,
    adapter: AdapterRecord,
    change: Change,
    version: NewVersion,
    numbers: dict[Artifact, int],
    revision: int,
    now: datetime,
) -> int:
    """Write the row of a new version; return its number."""
    # A counter, not the highest number plus one, so that numbers of deleted versions are never reused.
    mine = adapters.c.uid == adapter.uid
    number: int = connection.execute(select(adapters.c.next_version).where(mine)).scalar_one()
    connection.execute(update(adapters).where(mine).values(next_version=number + 1))
    basis = change.rebase or adapter
    values = {
        "adapter_uid": adapter.uid,
        "number": number,
        "revision": revision if version.revision is None else version.revision,
        "method": version.method,
        "backbone": basis.backbone,
        "fingerprint": basis.fingerprint,
        "artifact_id": numbers[version.artifact],
        "evidence_id": None if version.evidence is None else numbers[version.evidence],
        "network_id": None if version.network is None else numbers[version.network],
        "report": json.dumps(version.report, allow_nan=False),
        "labels": version.labels,
        "created_at": now,
    }
    connection.execute(insert(versions).values(values))
    return number


def placed(change: Change) -> tuple[ExampleWrite | Repoint, ...]:
    """The examples of a change that have a place in a segment."""
    return (*change.upserts, *change.repoints)
