"""The rows of a backup, altered on their way into a database that is already in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Table, select

from adapters.maintenance.table_copy import Row
from adapters.registry.schema import adapters, jobs, keys, tenants
from adapters.registry.statements.commit import next_epoch
from adapters.registry.statements.job_rows import OPEN


@dataclass(frozen=True, slots=True)
class TargetState:
    """The state of the target before the restore: numbers that must not be given again, and names."""

    names: Mapping[tuple[str, str], str]  # uid, by tenant and adapter name
    adapters: Mapping[str, tuple[int, int, int]]  # revision, next version and epoch, by uid
    attempts: Mapping[str, int]  # by job id
    keys: Mapping[str, tuple[datetime | None, datetime | None]]  # times of revocation and expiry, by key id
    tenants: frozenset[str]

    @classmethod
    def read(cls, connection: Connection) -> TargetState:
        """Read the state in the connection's transaction."""
        columns = (adapters.c.tenant, adapters.c.name, adapters.c.uid)
        counted = (adapters.c.revision, adapters.c.next_version, adapters.c.epoch)
        rows = connection.execute(select(*columns, *counted)).all()
        return cls(
            {(row[0], row[1]): row[2] for row in rows},
            {row[2]: (row[3], row[4], row[5]) for row in rows},
            {row[0]: row[1] for row in connection.execute(select(jobs.c.id, jobs.c.attempt))},
            {
                row[0]: (row[1], row[2])
                for row in connection.execute(select(keys.c.id, keys.c.revoked_at, keys.c.expires_at))
            },
            frozenset(connection.scalars(select(tenants.c.name))),
        )


class RowRestorer:
    """Alters the backup's rows on their way into the target.

    `restored`: tenant and name of the adapters that arrived. `gone`: those of adapters that the target had
    and that are not restored with the same uid.
    """

    def __init__(self, before: TargetState, now: datetime) -> None:
        self.restored: set[tuple[str, str]] = set()
        self.gone = set(before.names)
        self._before = before
        self._now = now

    def alter(self, table: Table) -> Callable[[Row], Row]:
        """Return the function that alters each row of the table."""
        special = {adapters.name: self._adapter, jobs.name: self._job, keys.name: self._key}
        return special.get(table.name, lambda row: row)

    def _adapter(self, row: Row) -> Row:
        name = (row["tenant"], row["name"])
        self.restored.add(name)
        if self._before.names.get(name) == row["uid"]:
            self.gone.discard(name)
        revision, next_version, epoch = self._before.adapters.get(row["uid"], (0, 0, 0))
        return row | {
            # The revision is above both, so that a service with cached examples reads them again.
            "revision": max(row["revision"], revision) + 1,
            "next_version": max(row["next_version"], next_version),
            "epoch": next_epoch(max(row["epoch"], epoch), self._now),
        }

    def _job(self, row: Row) -> Row:
        """Queue an unfinished job again. A worker that holds an attempt in the target loses its lease.

        Backups leave checkpoints out.
        """
        row = row | {"checkpoint": None}
        if row["state"] not in OPEN:
            return row
        attempt = max(row["attempt"], self._before.attempts.get(row["id"], 0))
        interrupted = attempt - row["attempt"] + (row["state"] == "running")
        return row | {
            "state": "queued",
            "lease_until": None,
            "attempt": attempt,
            "released": row["released"] + interrupted,
        }

    def _key(self, row: Row) -> Row:
        """Keep the earlier expiry, and any revocation: a restore must not revive a revoked key."""
        revoked, expires = self._before.keys.get(row["id"], (None, None))
        ends = [end for end in (expires, row["expires_at"]) if end is not None]
        return row | {"revoked_at": revoked or row["revoked_at"], "expires_at": min(ends, default=None)}
