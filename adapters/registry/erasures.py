"""Erases tenants, adapters and examples from the tables, and keeps what a restored backup must forget again.

Rows only: files are deleted by adapters/adaptation/erasure.py, which also says when.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, exists, func, insert, select, update

from adapters.registry.database import Database, take_turns
from adapters.registry.idempotency import forget
from adapters.registry.jobs import forget_examples, new_id
from adapters.registry.records import AdapterRecord, RegistryError, UnknownTenant
from adapters.registry.schema import (
    adapters,
    artifacts,
    changes,
    erasures,
    examples,
    jobs,
    keys,
    replies,
    tenants,
    versions,
)
from adapters.registry.statements.queries import adapter_by_name, chunks, current_time

ERASURES_KEPT = timedelta(days=400)
"""How long an erasure is remembered, and so how old a backup may be that is restored without what it took."""
ALL = "*"
"""Of an adapter's examples: all that it had."""
NAME_TAKEN = 5.0
"""Seconds after its erasure in which a tenant gets nothing new: keys may still be taken for good so long, see
service/edge/key_cache.py."""
_WHOLE = "*"
# Between a request's first look at the database and its age as it is counted.
_SLACK = 1.0
_DIGITS = 32
_FORGOTTEN_AT_ONCE = 100
# In the order in which they refer to each other.
_OF_AN_ADAPTER = (replies, jobs, examples, versions, artifacts)


class TenantErased(RegistryError):
    """The tenant was erased while the request was under way, or a moment before it came."""

    code = "tenant_erased"
    retry_after = NAME_TAKEN

    def __init__(self, tenant: str) -> None:
        super().__init__(f"The tenant {tenant!r} has just been erased; its name is free again in seconds.")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an erasure took: adapters, the examples in them, and so on."""

    id: str
    tenant: str
    at: datetime
    adapters: int = 0
    examples: int = 0
    versions: int = 0
    jobs: int = 0
    keys: int = 0


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An erasure whose adapters' files may still be there. whole: a tenant's. age: seconds."""

    id: str
    tenant: str
    uids: tuple[str, ...]
    whole: bool
    age: float


class Erasures:
    """What was erased. Thread-safe, blocking. Every method may raise RegistryUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def tenant(self, name: str) -> Receipt:
        """Erase all rows of the tenant; the caller then deletes its files. Raises UnknownTenant."""
        with self._database.writing() as connection:
            return _erase_tenant(connection, name)

    def unfinished(self) -> list[Unfinished]:
        """The erasures whose files may still be there, the oldest first."""
        with self._database.reading() as connection:
            now = current_time(connection)
            query = select(erasures).where(erasures.c.files.is_not(None)).order_by(erasures.c.at)
            return [
                Unfinished(
                    row.id,
                    row.tenant,
                    tuple(uid for uid in row.files.split() if uid != _WHOLE),
                    _WHOLE in row.files.split(),
                    (now - row.at).total_seconds(),
                )
                for row in connection.execute(query)
            ]

    def finish(self, erasure_id: str) -> None:
        """The files are gone, and nobody is left who could bring one."""
        with self._database.writing() as connection:
            connection.execute(update(erasures).where(erasures.c.id == erasure_id).values(files=None))

    def newest(self) -> str | None:
        """The id of the newest erasure."""
        with self._database.reading() as connection:
            newest: str | None = connection.execute(select(func.max(erasures.c.id))).scalar_one()
            return newest

    def clear_pages(self) -> None:
        """Overwrite what deleted rows left in the database's pages."""
        self._database.clear_pages()


def erase_adapter(connection: Connection, tenant: str, name: str) -> tuple[Receipt, str]:
    """Delete all rows of the adapter; the receipt, and its uid. Raises UnknownAdapter."""
    adapter = adapter_by_name(connection, tenant, name, lock=True)
    counts = _delete(connection, [adapter.uid])
    return record(connection, tenant, counts, adapter_uid=adapter.uid, files=[adapter.uid]), adapter.uid


def erase_examples(connection: Connection, adapter: AdapterRecord, ids: Collection[str]) -> Receipt:
    """Remember that these examples are erased, whose rows the caller deletes. Replies go with them, and what
    jobs that have ended told of them.
    """
    everything = len(ids) == adapter.examples
    digests = ALL if everything else ",".join(sorted(digest(example) for example in ids))
    forget(connection, adapter.uid)
    forget_examples(connection, adapter.uid, None if everything else ids)
    counts = {"examples": len(ids)}
    return record(connection, adapter.tenant, counts, adapter_uid=adapter.uid, examples=digests)


def digest(example_id: str) -> str:
    """By what an erased example is remembered."""
    return hashlib.sha256(example_id.encode()).hexdigest()[:_DIGITS]


def check_not_erased(connection: Connection, tenant: str, age: float) -> None:
    """Raises TenantErased where the tenant was erased since `age` seconds ago, or just before.

    For a writing transaction that gives the tenant something; an erasure waits for its end, or it for the
    erasure's.
    """
    _take_turn(connection, tenant)
    since = current_time(connection) - timedelta(seconds=max(age + _SLACK, NAME_TAKEN))
    of_tenant = (erasures.c.tenant == tenant) & erasures.c.adapter_uid.is_(None) & (erasures.c.at >= since)
    if connection.execute(select(exists().where(of_tenant))).scalar_one():
        raise TenantErased(tenant)


def record(
    connection: Connection,
    tenant: str,
    counts: dict[str, int],
    *,
    adapter_uid: str | None = None,
    examples: str | None = None,
    files: Collection[str] = (),
) -> Receipt:
    """Remember an erasure; forget a few of those that are remembered long enough."""
    now = current_time(connection)
    receipt = Receipt(new_id(now), tenant, now, **counts)
    values = {
        "id": receipt.id,
        "tenant": tenant,
        "adapter_uid": adapter_uid,
        "examples": examples,
        "files": " ".join(files) or None,
        "receipt": json.dumps(counts),
        "at": now,
    }
    connection.execute(insert(erasures).values(values))
    old = (
        select(erasures.c.id)
        .where(erasures.c.at < now - ERASURES_KEPT, erasures.c.files.is_(None))
        .limit(_FORGOTTEN_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    connection.execute(delete(erasures).where(erasures.c.id.in_(old)))
    return receipt


def _erase_tenant(connection: Connection, name: str) -> Receipt:
    # Those who give the tenant an adapter or a key take the same turns.
    _take_turn(connection, name)
    take_turns(connection, f"keys of {name}")
    mine = adapters.c.tenant == name
    uids = list(
        connection.scalars(select(adapters.c.uid).where(mine).order_by(adapters.c.uid).with_for_update())
    )
    counts = _delete(connection, uids)
    connection.execute(delete(replies).where(replies.c.tenant == name))
    # Adapters that were deleted a moment ago are named here.
    connection.execute(delete(changes).where(changes.c.tenant == name))
    counts["keys"] = connection.execute(delete(keys).where(keys.c.tenant == name)).rowcount
    known = connection.execute(delete(tenants).where(tenants.c.name == name)).rowcount
    if not known and not uids:
        raise UnknownTenant(name)
    # A mark for the tenant itself, which may have files and no adapter.
    receipt = record(connection, name, counts, files=[*uids, _WHOLE])
    connection.execute(insert(changes).values(tenant=name, name="", at=receipt.at, gone=True))
    return receipt


def _delete(connection: Connection, uids: Collection[str]) -> dict[str, int]:
    """Deletes adapters with all that refers to them; how many rows went."""
    counts = dict.fromkeys(("adapters", "examples", "versions", "jobs"), 0)
    for chunk in chunks(uids):
        for table in _OF_AN_ADAPTER:
            gone = connection.execute(delete(table).where(table.c.adapter_uid.in_(chunk))).rowcount
            if table.name in counts:
                counts[table.name] += gone
        counts["adapters"] += connection.execute(delete(adapters).where(adapters.c.uid.in_(chunk))).rowcount
    return counts


def _take_turn(connection: Connection, tenant: str) -> None:
    take_turns(connection, f"tenant {tenant}")
