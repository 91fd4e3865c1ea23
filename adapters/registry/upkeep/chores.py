"""Turns at chores: work that one process does for all that share the database.

The turn is a row with a time, not an advisory lock: a lock of a session does not work through a pooler that
gives each transaction another session, a lock of a transaction would keep one open for as long as the work
lasts, SQLite has neither, and a lock does not remember when the work was last done.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Connection, select, update
from sqlalchemy.dialects import postgresql, sqlite

from adapters.registry.database import Database
from adapters.registry.errors import RegistryUnavailable
from adapters.registry.schema import chores
from adapters.registry.statements.queries import current_time
from adapters.storage.artifact import StoreFull

logger = logging.getLogger("topwork")

Chore = Literal["sweep", "clear", "count"]

TURN_SECONDS = 60.0
"""Seconds without a sign of its process after which a turn is over, so that another process may begin one."""
_BEATS = 3.0  # signs in that time, so that one or two may fail


@dataclass(slots=True)
class Turn:
    """A turn at a chore."""

    pause: float  # seconds from its end until the next turn
    result: str | None = None  # what all processes are to know of it
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began


@dataclass(frozen=True, slots=True)
class Done:
    """The last turn at a chore that succeeded."""

    result: str | None
    age: float  # seconds


class Chores:
    """The chores of a database. Thread-safe, blocking. Times are by the database's clock.

    `turn_seconds`: see TURN_SECONDS. Every method may raise RegistryUnavailable.
    """

    def __init__(self, database: Database, *, turn_seconds: float = TURN_SECONDS) -> None:
        self._database = database
        self._seconds = turn_seconds

    @contextmanager
    def turn(self, chore: Chore, pause: float) -> Iterator[Turn | None]:
        """Take a turn, which lasts as long as the block; None if another has it, or the chore is not due.

        `pause`: seconds until the next turn, which the block may change. The work must be safe to do twice at
        once: the turn of a process that was frozen ends, and the process may wake up in the middle.
        """
        name = uuid.uuid4().hex
        if not self._begin(chore, name):
            yield None
            return
        turn = Turn(pause)
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(chore, name, ended), name="turn", daemon=True)
        beating.start()
        done = False
        try:
            yield turn
            done = True
        finally:
            ended.set()
            beating.join()
            self._end(chore, name, turn, done)

    def done(self, chore: Chore) -> Done | None:
        """Return the last turn that succeeded, None if there was none."""
        query = select(chores.c.done_at, chores.c.result).where(chores.c.name == chore)
        with self._database.reading() as connection:
            row = connection.execute(query).one_or_none()
            if row is None or row.done_at is None:
                return None
            return Done(row.result, (current_time(connection) - row.done_at).total_seconds())

    def _begin(self, chore: Chore, turn: str) -> bool:
        with self._database.reading() as connection:
            # All processes ask, most of them in vain, and then writers must not wait.
            due = connection.scalar(select(chores.c.due_at).where(chores.c.name == chore))
            if due is not None and due > current_time(connection):
                return False
        with self._database.writing() as connection:
            now = current_time(connection)
            values = {"turn": turn, "due_at": now + timedelta(seconds=self._seconds)}
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            row = dialect.insert(chores).values(name=chore, **values)
            due = chores.c.due_at <= now
            taken = row.on_conflict_do_update(index_elements=["name"], set_=values, where=due)
            return connection.execute(taken.returning(chores.c.name)).first() is not None

    def _beat(self, chore: Chore, turn: str, ended: threading.Event) -> None:
        while not ended.wait(self._seconds / _BEATS):
            try:
                with self._database.writing() as connection:
                    until = current_time(connection) + timedelta(seconds=self._seconds)
                    if not self._write(connection, chore, turn, due_at=until):
                        return
            except (RegistryUnavailable, StoreFull) as error:
                logger.warning("a turn at the chore %s could not be prolonged: %s", chore, error)

    def _end(self, chore: Chore, turn: str, how: Turn, done: bool) -> None:
        with self._database.writing() as connection:
            now = current_time(connection)
            values: dict[str, Any] = {"due_at": now + timedelta(seconds=how.pause)}
            if done:
                values |= {"done_at": now, "result": how.result}
            self._write(connection, chore, turn, **values)

    @staticmethod
    def _write(connection: Connection, chore: Chore, turn: str, **values: datetime | str | None) -> bool:
        """Write to the chore's row; False if another turn has begun."""
        mine = (chores.c.name == chore) & (chores.c.turn == turn)
        return bool(connection.execute(update(chores).where(mine).values(**values)).rowcount)
