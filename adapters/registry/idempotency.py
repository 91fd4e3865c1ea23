"""What was answered to requests with an Idempotency-Key, written together with what they changed.

There is no row for a request that is still worked on: the primary key decides, when a change is committed,
which of several requests with one key was first. Rows only: what a request is, and how it is answered, the
layer above knows. Bodies are compressed, and of each tenant the newest MOST_BYTES are kept.
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
from adapters.registry.records import RegistryError, RevisionMoved
from adapters.registry.schema import replies
from adapters.registry.statements.queries import current_time

S = TypeVar("S")
T = TypeVar("T")

REPLIES_KEPT = 86_400.0
"""Seconds for which a reply is given again. They go sooner with their adapter, or with examples of it."""
MOST_BYTES = 64 << 20
"""What all replies of a tenant take in the database; the oldest go first. A MB or two more for a moment."""
_FORGOTTEN_AT_ONCE = 100
# SQLite reads a tenant's replies to add them up, so that is done about once for each megabyte written.
_COUNTED_EVERY = 1 << 20
_ROW_BYTES = 500  # of a row and its places in indexes, besides the body
_PACKED = "zlib:"
_FASTEST = 1  # others wait for the transaction


@dataclass(frozen=True, slots=True)
class StoredReply:
    """An answer, and the sha256 of the request that it was given to."""

    request_sha256: str
    status: int
    body: str


@final
@dataclass(frozen=True, slots=True)
class PendingReply(Generic[T]):
    """How a request with a key is answered once it is known what became of it.

    key_sha256: of the key. render: called in the transaction that makes the change, so that both are written
    or neither, in a thread and while other changes wait for it.
    """

    key_sha256: str
    render: Callable[[T], StoredReply]

    def of(self, outcome: Callable[[S], T]) -> PendingReply[S]:
        """The reply to what `outcome` makes a T of: a commit is less than the answer tells of."""
        return PendingReply(self.key_sha256, lambda found: self.render(outcome(found)))


class AlreadyAnswered(RegistryError):
    """A request with the key has been answered; what was to be written now is not."""

    code = "already_answered"

    def __init__(self, answered: StoredReply) -> None:
        super().__init__("A request with this Idempotency-Key was answered before.")
        self.answered = answered


class Replies:
    """The replies of every tenant. Thread-safe, blocking. Raises RegistryUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, tenant: str, key_sha256: str) -> StoredReply | None:
        """What the tenant was answered under the key in the last REPLIES_KEPT seconds."""
        with self._database.reading() as connection:
            return _find(connection, tenant, key_sha256)


def check_unanswered(connection: Connection, tenant: str, reply: PendingReply[Any] | None) -> None:
    """Raises AlreadyAnswered for a known key: before any other refusal, which would hide the answer."""
    found = None if reply is None else _find(connection, tenant, reply.key_sha256)
    if found is not None:
        raise AlreadyAnswered(found)


def keep(connection: Connection, tenant: str, uid: str, reply: PendingReply[T] | None, outcome: T) -> None:
    """Write the reply to what the transaction does to the adapter; for its very end.

    It waits for a transaction that has just written the same key. Raises AlreadyAnswered if that is
    committed.
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
        raise RevisionMoved("What was answered under the key has just been deleted; send the request again.")
    forgotten = (
        select(replies.c.tenant, replies.c.key_sha256)
        .where(old)
        .limit(_FORGOTTEN_AT_ONCE)
        # As with changes: two commits at once must not wait for each other over what both would forget.
        .with_for_update(skip_locked=True)
    )
    connection.execute(delete(replies).where(tuple_(replies.c.tenant, replies.c.key_sha256).in_(forgotten)))
    if random.random() * _COUNTED_EVERY < len(body) + _ROW_BYTES:
        _bound(connection, tenant)


def forget(connection: Connection, uid: str) -> None:
    """Delete the replies that tell of the adapter."""
    connection.execute(delete(replies).where(replies.c.adapter_uid == uid))


def _bound(connection: Connection, tenant: str) -> None:
    """Delete the oldest of the tenant's replies beyond MOST_BYTES."""
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
    """The body; what the release before has stored is the body itself."""
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
