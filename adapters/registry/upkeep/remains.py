"""What erasures leave behind: files, and bytes of deleted rows in the database's pages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, or_, select, update

from adapters.defaults import REWRITTEN_BYTES
from adapters.registry.database import Database
from adapters.registry.erasures import WHOLE
from adapters.registry.schema import erasures
from adapters.registry.statements.queries import current_time
from adapters.registry.upkeep.pages import free_pages, rewrite_file, rewrite_tables, small_tables

# Longest time, in seconds, between two deletions of the same files.
_MOST_SECONDS = 300.0
_UNCLEARED = erasures.c.pages.is_not(None)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An erasure whose files may not all be deleted yet."""

    id: str
    tenant: str
    uids: tuple[str, ...]  # of the erased adapters
    whole: bool  # the whole tenant was erased
    age: float  # seconds


class Remains:
    """What is left of erasures. Thread-safe, blocking. Every method may raise RegistryUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def due_files(self) -> list[str]:
        """Return the ids of the erasures whose files are to be deleted now, oldest first."""
        with self._database.reading() as connection:
            query = select(erasures.c.id).where(_files_due(current_time(connection)))
            return list(connection.scalars(query.order_by(erasures.c.at)))

    def take_files(self, erasure_id: str) -> Unfinished | None:
        """Return an erasure whose files the caller is to delete; None if another process does.

        The interval doubles from one deletion to the next, up to five minutes: an erasure of many adapters
        must not cause tens of thousands of deletions.
        """
        with self._database.writing() as connection:
            now = current_time(connection)
            due = select(erasures).where(erasures.c.id == erasure_id, _files_due(now))
            row = connection.execute(due.with_for_update(skip_locked=True)).one_or_none()
            if row is None:
                return None
            age = (now - row.at).total_seconds()
            again = now + timedelta(seconds=min(max(age, 0.5), _MOST_SECONDS))
            connection.execute(update(erasures).where(erasures.c.id == row.id).values(files_due_at=again))
            names = row.files.split()
            uids = tuple(name for name in names if name != WHOLE)
            return Unfinished(row.id, row.tenant, uids, WHOLE in names, age)

    def finish(self, erasure_id: str) -> None:
        """Record that the files are deleted, and that no process is left that could write another."""
        with self._database.writing() as connection:
            connection.execute(update(erasures).where(erasures.c.id == erasure_id).values(files=None))

    @property
    def uncleared(self) -> bool:
        """Whether the database's pages may still hold bytes of something erased."""
        with self._database.reading() as connection:
            return connection.scalar(select(erasures.c.id).where(_UNCLEARED).limit(1)) is not None

    def clear_pages(self, rewritten_bytes: int = REWRITTEN_BYTES) -> float:
        """Clear the pages of the tables that erasures touched since the last time.

        PostgreSQL's tables of up to `rewritten_bytes` are rewritten; in larger ones, the space of what was
        deleted is freed for later writes. Returns the age in seconds of the oldest erasure that is still in
        the pages of a table to rewrite, 0 if there is none: call again later.
        """
        with self._database.reading() as connection:
            now = current_time(connection)
            todo = connection.execute(select(erasures).where(_UNCLEARED)).all()
        tables = {name for row in todo for name in row.pages.split()}
        if not todo:
            return 0.0
        if self._database.is_sqlite:
            rewrite_file(self._database)
            self._cleared(todo, tables)
            return 0.0
        small = small_tables(self._database, tables, rewritten_bytes)
        clear = rewrite_tables(self._database, small, [row.id for row in todo])
        self._cleared(todo, clear)
        large = tables.difference(small)
        free_pages(self._database, large)
        self._cleared(todo, clear | large)
        left = [row.at for row in todo if not clear | large >= set(row.pages.split())]
        return (now - min(left)).total_seconds() if left else 0.0

    def _cleared(self, todo: Sequence[Row[Any]], tables: Collection[str]) -> None:
        """Record that these tables hold nothing any more of these erasures."""
        with self._database.writing() as connection:
            for row in todo:
                left = " ".join(name for name in row.pages.split() if name not in tables)
                if left != row.pages:
                    mine = update(erasures).where(erasures.c.id == row.id)
                    connection.execute(mine.values(pages=left or None))


def _files_due(now: datetime) -> ColumnElement[bool]:
    due = or_(erasures.c.files_due_at.is_(None), erasures.c.files_due_at <= now)
    return and_(erasures.c.files.is_not(None), due)
