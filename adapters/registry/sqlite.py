"""How this process uses a SQLite file, and why it cannot be used."""

from __future__ import annotations

import sqlite3
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.pool import ConnectionPoolEntry

DAMAGED = "Stop the programs that use it, move it away, and restore a backup with `topwork restore`."
# Reasons why a SQLite file is unusable, by SQLite's primary result code.
_UNUSABLE = {
    sqlite3.SQLITE_NOTADB: "is no SQLite file, or its header is damaged. " + DAMAGED,
    sqlite3.SQLITE_CORRUPT: "is damaged. " + DAMAGED,
    sqlite3.SQLITE_CANTOPEN: (
        "cannot be opened. Its folder must be there and be this user's to write to, and it must be a file; "
        "TOPWORK_HOME or TOPWORK_DATABASE_URL says where it is."
    ),
    sqlite3.SQLITE_READONLY: "cannot be written. Give this user the right to write to it and to its folder.",
    sqlite3.SQLITE_PERM: "cannot be used. Give this user the right to write to it and to its folder.",
}


def wal_is_safe(version: tuple[int, int, int]) -> bool:
    """Return whether this SQLite version is free of the WAL-reset bug, which can lose committed rows."""
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51, 0) or (3, 44, 6) <= version < (3, 45, 0)


def prepare(connection: sqlite3.Connection, entry: ConnectionPoolEntry) -> None:
    """Set up a new connection. Its transactions must be begun with `begin`."""
    # The driver would begin transactions late and end them early around DDL.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")
    # In DELETE mode only EXTRA syncs the directory after the journal is unlinked, which is the commit.
    wal = wal_is_safe(sqlite3.sqlite_version_info)
    connection.execute(f"PRAGMA synchronous = {'FULL' if wal else 'EXTRA'}")


def begin(connection: Connection) -> None:
    """Begin a transaction, which locks the file if the option `begin_immediate` is set."""
    # A transaction that reads first and writes later could fail halfway, so writers lock at the start.
    immediate = connection.get_execution_options().get("begin_immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def why_unusable(error: Any) -> str | None:
    """Return why a SQLite file cannot be used and what to do, or None if waiting may help."""
    if isinstance(error, sqlite3.OperationalError) and str(error).startswith(
        ("no such table", "no such col")
    ):
        return f"lacks a part of its tables ({error}). {DAMAGED}"
    code = getattr(error, "sqlite_errorcode", None)
    # The low byte is the primary code.
    return None if code is None else _UNUSABLE.get(code & 0xFF)
