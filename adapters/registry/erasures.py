"""Erases tenants, adapters and examples from the tables, and records what a restored backup must erase again.

Rows only: adapters/adaptation/erasure.py deletes the files, and decides when.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, exists, insert, select, update

from adapters.registry.database import Database, take_turns
from adapters.registry.errors import UnknownTenant
from adapters.registry.idempotency import forget
from adapters.registry.records import AdapterRecord
from adapters.registry.schema import (
    adapters,
    artifacts,
    changes,
    erasures,
    examples,
    jobs,
    keys,
    rates,
    replies,
    tenants,
    versions,
)
from adapters.registry.statements.changes import announce
from adapters.registry.statements.job_rows import forget_examples, new_id
from adapters.registry.statements.queries import adapter_by_name, chunks, current_time
from models.errors import Conflict

ERASURES_KEPT = timedelta(days=400)
"""How long an erasure is recorded. A backup up to this age can be restored without the erased data."""
ALL = "*"
"""Marks that all examples of an adapter were erased."""
NAME_TAKEN = 5.0
"""Seconds after a tenant's erasure during which nothing is created for it. Cached keys may be accepted that
long, see service/edge/key_cache.py."""
WHOLE = "*"
"""Marks in the `files` column that the whole tenant was erased."""
# Seconds allowed between a request's first read of the database and the moment from which its age counts.
_SLACK = 1.0
_DIGITS = 32  # length of an example's digest, in hex digits
_FORGOTTEN_AT_ONCE = 100  # expired records deleted by each new one
# The tables with an adapter's rows; each comes before the tables that its rows refer to.
_OF_AN_ADAPTER = (replies, jobs, examples, versions, artifacts)


class TenantErased(Conflict):
    """The tenant was erased during the request, or a moment before it."""

    code = "tenant_erased"
    retry_after = NAME_TAKEN

    def __init__(self, tenant: str) -> None:
        super().__init__(
            f"The tenant {tenant!r} has just been erased. Its name is free again in a few seconds."
        )


@dataclass(frozen=True, slots=True)
class Receipt:
    """How many rows of each kind an erasure deleted."""

    id: str
    tenant: str
    at: datetime
    adapters: int = 0
    examples: int = 0
    versions: int = 0
    jobs: int = 0
    keys: int = 0


class Erasures:
    """Erasures of tenants. Thread-safe, blocking. Every method may raise RegistryUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def tenant(self, name: str) -> Receipt:
        """Erase all rows of the tenant; the caller then deletes its files. Raises UnknownTenant."""
        with self._database.writing() as connection:
            return _erase_tenant(connection, name)


def erase_adapter(connection: Connection, tenant: str, name: str) -> tuple[Receipt, str]:
    """Delete all rows of the adapter; return the receipt and the adapter's uid. Raises UnknownAdapter."""
    adapter = adapter_by_name(connection, tenant, name, lock=True)
    counts = delete_adapters(connection, [adapter.uid])
    return record(connection, tenant, counts, adapter_uid=adapter.uid, files=[adapter.uid]), adapter.uid


def erase_examples(connection: Connection, adapter: AdapterRecord, ids: Collection[str]) -> Receipt:
    """Record that these examples are erased; the caller deletes their rows.

    Also deletes the adapter's replies, and what its finished jobs reported about these examples.
    """
    everything = len(ids) == adapter.examples
    digests = ALL if everything else ",".join(sorted(digest(example) for example in ids))
    forget(connection, adapter.uid)
    forget_examples(connection, adapter.uid, None if everything else ids)
    counts = {"examples": len(ids)}
    return record(connection, adapter.tenant, counts, adapter_uid=adapter.uid, examples=digests)


def digest(example_id: str) -> str:
    """Return the truncated sha256 that identifies an erased example."""
    return hashlib.sha256(example_id.encode()).hexdigest()[:_DIGITS]


def check_not_erased(connection: Connection, tenant: str, age: float) -> None:
    """Raises TenantErased if the tenant was erased in the last `age` seconds, or just before.

    Call it in a writing transaction that creates something for the tenant. That transaction and an erasure
    of the tenant wait for each other.
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
    """Record an erasure, and delete some finished records older than ERASURES_KEPT."""
    now = current_time(connection)
    receipt = Receipt(new_id(now), tenant, now, **counts)
    values = {
        "id": receipt.id,
        "tenant": tenant,
        "adapter_uid": adapter_uid,
        "examples": examples,
        "files": " ".join(files) or None,
        "receipt": json.dumps(counts),
        "pages": pages_of(adapter_uid, examples),
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


def pages_of(adapter_uid: str | None, digests: str | None) -> str:
    """Return the names of the tables that may hold what an erasure with these columns deletes."""
    touched = list(_OF_AN_ADAPTER)
    if digests is None:
        touched.append(adapters)
    if adapter_uid is None:
        touched += [changes, keys, rates, tenants]
    return " ".join(table.name for table in touched)


def _erase_tenant(connection: Connection, name: str) -> Receipt:
    # Transactions that create an adapter or a key of the tenant take the same locks.
    _take_turn(connection, name)
    take_turns(connection, f"keys of {name}")
    mine = adapters.c.tenant == name
    uids = list(
        connection.scalars(select(adapters.c.uid).where(mine).order_by(adapters.c.uid).with_for_update())
    )
    counts = delete_adapters(connection, uids)
    connection.execute(delete(replies).where(replies.c.tenant == name))
    # These rows name recently deleted adapters of the tenant. They stay, because `changes_since` misses none.
    connection.execute(update(changes).where(changes.c.tenant == name).values(name="", gone=True))
    counts["keys"] = connection.execute(delete(keys).where(keys.c.tenant == name)).rowcount
    known = connection.execute(delete(tenants).where(tenants.c.name == name)).rowcount
    if not known and not uids:
        raise UnknownTenant(name)
    # The mark stands for the tenant itself, which may have files but no adapter.
    receipt = record(connection, name, counts, files=[*uids, WHOLE])
    announce(connection, name, "", gone=True)
    return receipt


def delete_adapters(connection: Connection, uids: Collection[str]) -> dict[str, int]:
    """Delete adapters and all rows that refer to them; return the counts of a Receipt."""
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
