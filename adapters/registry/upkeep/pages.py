"""Removes the bytes of deleted rows from the database's pages.

PostgreSQL leaves those bytes in place. SQLite overwrites them (secure_delete), but not the copies left behind
when it moved rows within a page. Only a rewritten table is free of them.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Sequence

from sqlalchemy import Connection, text

from adapters.registry.database import Database
from adapters.registry.schema import metadata

# Largest SQLite file that is rewritten, which takes a second or two. Others can read it meanwhile.
_REWRITTEN_FILE = 256 << 20
# A table that others use is tried again, instead of waiting for its lock: all who come later would wait, too.
_TRIES, _PAUSE = 20, 0.025  # seconds

# Tables that hold nothing of before the last of these erasures: a rewrite keeps rows that any transaction can
# still see, and moves the table's oldest transaction id only past those that it does not keep.
_CLEAR = """SELECT relname FROM pg_class
    WHERE oid = ANY (CAST(CAST(:tables AS text[]) AS regclass[])) AND age(relfrozenxid) <
        (SELECT min(age(xmin)) FROM erasures WHERE id = ANY (CAST(:erasures AS text[])))"""


def rewrite_file(database: Database) -> None:
    """Rewrite a SQLite file of up to 256 MB, and truncate its log, which holds old pages."""
    with database.maintaining() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        (pages,), (size,) = (
            driver.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
        )
        if pages * size <= _REWRITTEN_FILE:
            driver.execute("VACUUM")
        driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def small_tables(database: Database, tables: Collection[str], most_bytes: int) -> list[str]:
    """Return those of PostgreSQL's tables that have up to `most_bytes`, indexes included, smallest first."""
    with database.reading() as connection:
        sizes = _numbers(connection, "pg_total_relation_size", tables)
    return sorted((name for name, size in sizes.items() if size <= most_bytes), key=sizes.__getitem__)


def rewrite_tables(database: Database, tables: Sequence[str], erasures: Sequence[str]) -> set[str]:
    """Rewrite tables of PostgreSQL; return those that hold nothing any more of what the erasures deleted.

    The others are in use, or a transaction from before the erasures can still see what was deleted.
    """
    left = list(tables)
    with database.maintaining() as connection:
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE)
            before = _numbers(connection, "pg_relation_filenode", left)
            for table in left:
                _vacuum(connection, table, "FULL, SKIP_LOCKED")
            after = _numbers(connection, "pg_relation_filenode", left)
            # A table that was rewritten and is not clear waits for a transaction, which may last.
            left = [table for table in left if after[table] == before[table]]
            if not left:
                break
        found = connection.execute(text(_CLEAR), {"tables": list(tables), "erasures": list(erasures)})
        return set(found.scalars())


def free_pages(database: Database, tables: Collection[str]) -> None:
    """Free the space of rows deleted from tables of PostgreSQL. Reads and writes do not wait."""
    with database.maintaining() as connection:
        for table in tables:
            # Autovacuum does the same, so a table that it works on is left to it.
            _vacuum(connection, table, "SKIP_LOCKED")


def _vacuum(connection: Connection, table: str, options: str) -> None:
    name = connection.dialect.identifier_preparer.format_table(metadata.tables[table])
    connection.execute(text(f"VACUUM ({options}) {name}"))


def _numbers(connection: Connection, function: str, tables: Collection[str]) -> dict[str, int]:
    """Return what a function of PostgreSQL says of each table."""
    each = "SELECT unnest(CAST(:tables AS text[])) AS name"
    query = text(f"SELECT name, {function}(CAST(name AS regclass)) FROM ({each}) AS tables")
    return {row.name: row[1] for row in connection.execute(query, {"tables": list(tables)})}
