"""Replies to requests with an Idempotency-Key, written in the transaction that makes the request's change.

A request in progress has no row. At the commit, the primary key decides which of several requests with the
same key was first. Rows only: the layer above defines what a request is and how it is answered. Bodies are
compressed, and the newest MOST_BYTES of each tenant are kept.
"""

from __future__ import annotations

import base64
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar, final

from sqlalchemy import Connection, and_, delete, func, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

from adapters.registry.database import Database
from adapters.registry.errors import RevisionMoved
from adapters.registry.schema import replies
from adapters.registry.statements.queries import current_time
from models.errors import DomainError

S = TypeVar("S")
T = TypeVar("T")

REPLIES_KEPT = 86_400.0
"""Seconds for which a reply is kept. Erasing its adapter, or examples of the adapter, deletes it earlier."""
MOST_BYTES = 64 << 20
"""Database space for a tenant's replies; the oldest are deleted. May be exceeded briefly by a MB or two."""
_FORGOTTEN_AT_ONCE = 100  # expired replies deleted by each new one
# Bytes written, on average, between two checks of MOST_BYTES: SQLite reads all replies of a tenant for one.
_COUNTED_EVERY = 1 << 20
_ROW_BYTES = 500  # size of a row with its index entries, without the body
_PACKED = "zlib:"
_FASTEST = 1  # zlib level; other writers wait for the transaction


@dataclass(frozen=True, slots=True)
class StoredReply:
    """A reply, and the sha256 of the request that it answers."""

    request_sha256: str
    status: int
    body: str


@final
@dataclass(frozen=True, slots=True)
class PendingReply(Generic[T]):
    """How to answer a request with an Idempotency-Key, once its outcome is known."""

    key_sha256: str
    # Called in a thread, in the transaction that makes the change, so that both are written or neither.
    # Other changes wait for it.
    render: Callable[[T], StoredReply]

    def of(self, outcome: Callable[[S], T]) -> PendingReply[S]:
        """Return the reply to an S, which `outcome` turns into a T: a response says more than a commit."""
        return PendingReply(self.key_sha256, lambda found: self.render(outcome(found)))


class AlreadyAnswered(DomainError):
    """A request with this key was answered before. Nothing is written for this one."""

    code = "already_answered"

    def __init__(self, answered: StoredReply) -> None:
        super().__init__("A request with this Idempotency-Key was answered before.")
        self.answered = answered


class Replies:
    """The replies to all tenants. Thread-safe, blocking. Raises RegistryUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, tenant: str, key_sha256: str) -> StoredReply | None:
        """Return the reply to the tenant's request with this key from the last REPLIES_KEPT seconds."""
        with self._database.reading() as connection:
            return _find(connection, tenant, key_sha256)


def check_unanswered(connection: Connection, tenant: str, reply: PendingReply[Any] | None) -> None:
    """Raises AlreadyAnswered for a known key. Call it before checks whose errors would hide the reply."""
    found = None if reply is None else _find(connection, tenant, reply.key_sha256)
    if found is not None:
        raise AlreadyAnswered(found)


def keep(connection: Connection, tenant: str, uid: str, reply: PendingReply[T] | None, outcome: T) -> None:
    """Write the reply that reports the transaction's change to the adapter. Call it last in the transaction.

    Waits for a transaction that has just written the same key. Raises AlreadyAnswered if that one was
    committed, RevisionMoved if its reply has been deleted since.
    """
    if reply is None:
        return
    answered = reply.render(outcome)
    body = _pack(answered.body)
    now = current_time(connection)
    old = replies.c.at < now - timedelta(seconds=REPLIES_KEPT)
    connection.execute(delete(replies).where(_under(tenant, reply.key_sha256), old))
    values = {
        "tenant": tenant,
        "key_sha256": reply.key_sha256,
        "request_sha256": answered.request_sha256,
        "adapter_uid": uid,
        "status": answered.status,
        "body": body,
        "at": now,
    }
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    written = dialect.insert(replies).values(values).on_conflict_do_nothing().returning(replies.c.status)
    if connection.execute(written).first() is None:
        check_unanswered(connection, tenant, reply)
        raise RevisionMoved(
            "The answer to this Idempotency-Key has just been deleted. Send the request again."
        )
    forgotten = (
        select(replies.c.tenant, replies.c.key_sha256)
        .where(old)
        .limit(_FORGOTTEN_AT_ONCE)
        # Concurrent commits must not wait for each other over rows that both would delete.
        .with_for_update(skip_locked=True)
    )
    connection.execute(delete(replies).where(tuple_(replies.c.tenant, replies.c.key_sha256).in_(forgotten)))
    if random.random() * _COUNTED_EVERY < len(body) + _ROW_BYTES:
        _bound(connection, tenant)


def forget(connection: Connection, uid: str) -> None:
    """Delete the replies that report on the adapter."""
    connection.execute(delete(replies).where(replies.c.adapter_uid == uid))


def _bound(connection: Connection, tenant: str) -> None:
    """Delete the tenant's oldest replies so that the rest fit in MOST_BYTES."""
    length = func.octet_length if connection.dialect.name == "postgresql" else func.length
    newer = func.sum(length(replies.c.body) + _ROW_BYTES).over(
        order_by=(replies.c.at.desc(), replies.c.key_sha256)
    )
    own = replies.c.tenant == tenant
    added_up = select(replies.c.key_sha256, newer.label("bytes")).where(own).subquery()
    beyond = select(added_up.c.key_sha256).where(added_up.c.bytes > MOST_BYTES)
    old = (
        select(replies.c.key_sha256)
        .where(own, replies.c.key_sha256.in_(beyond))
        .with_for_update(skip_locked=True)
    )
    connection.execute(delete(replies).where(own, replies.c.key_sha256.in_(old)))


def _pack(body: str) -> str:
    return _PACKED + base64.b64encode(zlib.compress(body.encode(), _FASTEST)).decode()


def _unpack(stored: str) -> str:
    """Return the body. The previous release stored it uncompressed."""
    if not stored.startswith(_PACKED):
        return stored
    return zlib.decompress(base64.b64decode(stored.removeprefix(_PACKED))).decode()


def _find(connection: Connection, tenant: str, key_sha256: str) -> StoredReply | None:
    young = replies.c.at >= current_time(connection) - timedelta(seconds=REPLIES_KEPT)
    query = select(replies.c.request_sha256, replies.c.status, replies.c.body)
    row = connection.execute(query.where(_under(tenant, key_sha256), young)).one_or_none()
    return None if row is None else StoredReply(row.request_sha256, row.status, _unpack(row.body))


def _under(tenant: str, key_sha256: str) -> Any:
    return and_(replies.c.tenant == tenant, replies.c.key_sha256 == key_sha256)
