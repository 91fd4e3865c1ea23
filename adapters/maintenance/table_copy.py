"""Copies rows and id counters from one database to another, each SQLite or PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, Table, func, insert, select, text

from adapters.registry.jobs import uploads_of
from adapters.registry.schema import adapters, artifacts, changes, chores, identity, jobs, metadata, rates
from adapters.storage.artifact import Artifact

Row = dict[str, Any]

TABLES: tuple[Table, ...] = tuple(metadata.sorted_tables)
"""All tables, in the order in which they can be filled: parents before the rows that refer to them."""

KEPT = (changes, chores, identity, rates)
"""Tables that a target keeps when its rows are replaced. Running services poll the changes, take turns at the
chores and count by the rates, and the identity is the target's own."""

_COUNTED = (artifacts.c.id, changes.c.epoch)  # columns that the database numbers
_AT_ONCE = 1_000  # rows per insert


def copy_rows(
    source: Connection, target: Connection, table: Table, alter: Callable[[Row], Row] = lambda row: row
) -> int:
    """Copy all rows of a table, each changed by `alter`; return how many."""
    copied = 0
    found = source.execute(select(table).execution_options(yield_per=_AT_ONCE))
    for part in found.partitions():
        target.execute(insert(table), [alter(dict(row._mapping)) for row in part])
        copied += len(part)
    return copied


def counters(connection: Connection) -> dict[str, int]:
    """Return the highest number given so far by each table with numbered rows, by table name."""
    found = {}
    for column in _COUNTED:
        if connection.dialect.name == "postgresql":
            last = connection.scalar(text(f"SELECT last_value FROM {_sequence(connection, column)}"))
        else:
            query = text("SELECT seq FROM sqlite_sequence WHERE name = :name")
            last = connection.scalar(query, {"name": column.table.name})
        highest = connection.scalar(select(func.max(column)))
        found[column.table.name] = max(last or 0, highest or 0)
    return found


def raise_counters(connection: Connection, least: Mapping[str, int]) -> None:
    """Raise each table's counter, so that its next number is above `least` and above all given before."""
    now = counters(connection)
    for column in _COUNTED:
        name = column.table.name
        value = {"name": name, "value": max(1, now[name], least.get(name, 0))}
        if connection.dialect.name == "postgresql":
            connection.execute(select(func.setval(_sequence(connection, column), value["value"])))
            continue
        raised = connection.execute(text("UPDATE sqlite_sequence SET seq = :value WHERE name = :name"), value)
        if not raised.rowcount:
            connection.execute(text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :value)"), value)


def references(connection: Connection) -> list[tuple[str, str, Artifact]]:
    """Return tenant, adapter uid and artifact of all that rows refer to, uploads of unfinished jobs too."""
    columns = (artifacts.c.adapter_uid, artifacts.c.sha256, artifacts.c.length, artifacts.c.nonce)
    of_adapter = artifacts.c.adapter_uid == adapters.c.uid
    query = select(adapters.c.tenant, *columns).join(adapters, of_adapter)
    found = {(row[0], row[1], Artifact(*row[2:])) for row in connection.execute(query)}
    waiting = select(adapters.c.tenant, adapters.c.uid).join(jobs, jobs.c.adapter_uid == adapters.c.uid)
    for tenant, uid in connection.execute(waiting.distinct()).all():
        found |= {(tenant, uid, part) for part in uploads_of(connection, uid)}
    return sorted(found, key=lambda one: (one[0], one[1], one[2].name))


def _sequence(connection: Connection, column: Any) -> str:
    name: str = connection.execute(
        select(func.pg_get_serial_sequence(column.table.name, column.name))
    ).scalar_one()
    return name
