"""Totals over all tenants, counted by one process and kept for all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import get_args

from sqlalchemy import ColumnElement, Connection, func, select

from adapters.registry.database import Database
from adapters.registry.records import JobState
from adapters.registry.schema import adapters, jobs
from adapters.registry.statements.job_rows import IS_OPEN, OPEN
from adapters.registry.upkeep.chores import Chores

COUNT_INTERVAL = 60.0
"""Seconds between two counts."""
FORGOTTEN_AFTER = 600.0
"""Age in seconds from which a count is not told any more: no process has counted since."""
# Pause after a count, as a multiple of the time that it took, if that is longer than the interval.
_REST = 3.0


@dataclass(frozen=True, slots=True)
class Counted:
    """Numbers of rows, over all tenants."""

    live_versions: int  # adapters with a live version
    jobs: Mapping[JobState, int]


class Totals:
    """Counts of a database's rows. Thread-safe, blocking. Every method may raise RegistryUnavailable."""

    def __init__(self, database: Database, chores: Chores) -> None:
        self._database = database
        self._chores = chores

    def count(self, pause: float = COUNT_INTERVAL) -> None:
        """Count all rows for all processes, unless one has done so in the last `pause` seconds."""
        with self._chores.turn("count", pause) as turn:
            if turn is None:
                return
            with self._database.reading() as connection:
                live = connection.execute(select(func.count(adapters.c.live))).scalar_one()
                counts = dict.fromkeys(get_args(JobState), 0) | _by_state(connection)
            turn.result = json.dumps(asdict(Counted(live, counts)))
            turn.pause = max(pause, _REST * turn.seconds)

    def counted(self) -> Counted | None:
        """Return the last count of any process; None if there was none in the last ten minutes."""
        done = self._chores.done("count")
        if done is None or done.result is None or done.age > FORGOTTEN_AFTER:
            return None
        return Counted(**json.loads(done.result))

    def open_jobs(self) -> dict[JobState, int]:
        """Return the numbers of queued and of running jobs, as they are now."""
        with self._database.reading() as connection:
            return dict.fromkeys(OPEN, 0) | _by_state(connection, IS_OPEN)


def _by_state(connection: Connection, *which: ColumnElement[bool]) -> dict[JobState, int]:
    query = select(jobs.c.state, func.count().label("number")).where(*which).group_by(jobs.c.state)
    return {row.state: row.number for row in connection.execute(query)}
