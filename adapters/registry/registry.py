"""Adapters, examples, versions and aliases in SQLite or PostgreSQL. Rows only: bytes are in the store."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable
from concurrent.futures import Executor
from datetime import timedelta
from typing import Any

from sqlalchemy import Select, and_, case, func, select

from adapters.registry.database import Database
from adapters.registry.erasures import Erasures, Receipt
from adapters.registry.idempotency import PendingReply, Replies, check_unanswered, keep
from adapters.registry.identity import Identity
from adapters.registry.jobs import Jobs, uploads_of
from adapters.registry.records import (
    AdapterExists,
    AdapterRecord,
    Alias,
    AliasMoved,
    Change,
    Changed,
    Claim,
    Committed,
    Creation,
    ExampleRecord,
    ExampleWrite,
    NewVersion,
    Rebase,
    RegistryError,
    RegistryTooNew,
    RegistryUnavailable,
    Repoint,
    RevisionMoved,
    UnknownAdapter,
    UnknownExample,
    UnknownVersion,
    VersionRecord,
)
from adapters.registry.schema import adapters, changes, erasures, examples
from adapters.registry.statements import commit as committing
from adapters.registry.statements.commit import CHANGES_KEPT
from adapters.registry.statements.queries import (
    adapter_by_name,
    adapter_by_uid,
    adapter_record,
    alias_of,
    artifacts_by_id,
    current_time,
    example_record,
    example_records,
    places_of,
    select_adapter,
    version_record,
    version_records,
    versions_without,
)
from adapters.registry.tenants import Tenants
from adapters.storage.artifact import Artifact

__all__ = [
    "CHANGES_KEPT",
    "AdapterExists",
    "AdapterRecord",
    "Alias",
    "AliasMoved",
    "Change",
    "Changed",
    "Committed",
    "Creation",
    "ExampleRecord",
    "ExampleWrite",
    "NewVersion",
    "Rebase",
    "Registry",
    "RegistryError",
    "RegistryTooNew",
    "RegistryUnavailable",
    "Repoint",
    "RevisionMoved",
    "UnknownAdapter",
    "UnknownExample",
    "UnknownVersion",
    "VersionRecord",
    "new_uid",
]


def new_uid() -> str:
    """A uid for an adapter that a Change creates."""
    return uuid.uuid4().hex


class Registry:
    """The rows of every tenant. Thread-safe, blocking: call it from a thread.

    url: SQLAlchemy's, sqlite:///<path> or postgresql://…; patience: seconds to wait for others' locks.

    Every method may raise RegistryUnavailable. One raised by a writing method leaves it open whether the
    write was recorded, so never delete the artifacts of such a change: if it was not, a sweep removes them
    later.
    """

    def __init__(self, url: str, *, patience: float = 30.0, writer: Executor | None = None) -> None:
        """writer: what commits in place of the caller's thread.

        A thread that gives way keeps everybody else's commits waiting while it waits for a core.
        """
        self._writer = writer
        self._database = Database(url, patience=patience)
        self._jobs = Jobs(self._database)
        self._tenants = Tenants(self._database)
        self._erasures = Erasures(self._database)
        self._replies = Replies(self._database)
        self._identity = Identity(self._database)

    @property
    def jobs(self) -> Jobs:
        """The durable jobs of every tenant, in the same database."""
        return self._jobs

    @property
    def tenants(self) -> Tenants:
        """The tenants and their keys, in the same database."""
        return self._tenants

    @property
    def erasures(self) -> Erasures:
        """What was erased, in the same database."""
        return self._erasures

    @property
    def replies(self) -> Replies:
        """What was answered to requests with an Idempotency-Key, in the same database."""
        return self._replies

    @property
    def identity(self) -> Identity:
        """What tells whether a store is this database's."""
        return self._identity

    def check_pages(self) -> None:
        """See Database.check_pages."""
        self._database.check_pages()

    def require_current(self) -> None:
        """See Database.require_current."""
        self._database.require_current()

    def migrate(self) -> None:
        """Bring the database to this release's tables; safe when several processes start at once.

        Raises RegistryTooNew if a newer release has been there.
        """
        self._database.migrate()

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def adapter(self, tenant: str, name: str) -> AdapterRecord:
        """The tenant's adapter. Raises UnknownAdapter, the same for another tenant's as for none."""
        with self._database.reading() as connection:
            return adapter_by_name(connection, tenant, name)

    def adapters(self, tenant: str, after: str | None = None, limit: int = 100) -> list[AdapterRecord]:
        """The tenant's adapters in the order of their names, those after `after`."""
        query = select_adapter().where(adapters.c.tenant == tenant).order_by(adapters.c.name).limit(limit)
        if after is not None:
            query = query.where(adapters.c.name > after)
        with self._database.reading() as connection:
            return [adapter_record(row) for row in connection.execute(query)]

    def delete_adapter(self, tenant: str, name: str) -> tuple[Receipt, str]:
        """Delete the adapter with all its rows, its jobs too; returns the receipt and its uid.

        The caller then deletes its files (Store.delete_adapter) and drops its alias. Raises UnknownAdapter.
        """
        with self._database.writing() as connection:
            return committing.delete_adapter(connection, tenant, name)

    def examples(
        self, uid: str, after: str | None = None, limit: int = 100, excluded: bool | None = None
    ) -> list[ExampleRecord]:
        """Examples in the order of their ids (by code point), those after `after`.

        excluded: only those that are set aside, or only the others.
        """

        def narrow(query: Select[Any]) -> Select[Any]:
            if excluded is not None:
                aside = examples.c.excluded_since
                query = query.where(aside.is_not(None) if excluded else aside.is_(None))
            return (query if after is None else query.where(examples.c.id > after)).limit(limit)

        with self._database.reading() as connection:
            return example_records(connection, uid, narrow)

    def example(self, uid: str, example_id: str) -> ExampleRecord:
        """One example. Raises UnknownExample."""
        with self._database.reading() as connection:
            return example_record(connection, uid, example_id)

    def all_examples(self, uid: str) -> tuple[int, list[ExampleRecord]]:
        """The revision and all examples of it in the order of their ids, in one consistent read.

        Raises UnknownAdapter if the adapter has been deleted.
        """
        with self._database.reading() as connection:
            return adapter_by_uid(connection, uid).revision, example_records(connection, uid)

    def places_of(
        self, tenant: str, fingerprint: str, digests: Iterable[str]
    ) -> dict[str, tuple[str, Artifact, int]]:
        """Where the tenant has embeddings of inputs by this backbone: an adapter's uid, a segment, a row."""
        with self._database.reading() as connection:
            return places_of(connection, tenant, fingerprint, digests)

    def versions(self, uid: str) -> list[VersionRecord]:
        """The versions that are kept, newest first."""
        with self._database.reading() as connection:
            return version_records(connection, uid)

    def versions_without(self, uid: str, ids: Collection[str]) -> list[VersionRecord]:
        """The versions that stay when these examples are removed, newest first."""
        with self._database.reading() as connection:
            return versions_without(connection, uid, ids)

    def version(self, uid: str, number: int) -> VersionRecord:
        """One version. Raises UnknownVersion."""
        with self._database.reading() as connection:
            return version_record(connection, uid, number)

    def resolve(self, tenant: str, name: str, version: int | None = None) -> Alias:
        """What a prediction by the live version, or by the one asked for, needs.

        Raises UnknownAdapter, UnknownVersion.
        """
        with self._database.reading() as connection:
            return alias_of(connection, adapter_by_name(connection, tenant, name), version)

    def commit(
        self, change: Change, *, job: Claim | None = None, reply: PendingReply[Committed] | None = None
    ) -> Committed:
        """Write the change in one durable transaction, or nothing of it.

        job: whose work this is. A version is its success, recorded in the same transaction. Raises LeaseLost,
        before anything else, unless the claim's attempt is the job's newest and its lease lasts: delete the
        artifacts then.

        reply: what is answered to the request whose work this is, written in the same transaction. Raises
        AlreadyAnswered where one was under its key.

        Raises UnknownAdapter (deleted meanwhile), RevisionMoved or AdapterExists (changed meanwhile: read
        again, merge, refit), UnknownExample (a removed or repointed id), StoreFull, and ValueError for a
        change that contradicts itself.
        """

        def write() -> Committed:
            with self._database.writing() as connection:
                check_unanswered(connection, change.tenant, reply)
                if job is not None:
                    committed = committing.commit_job(connection, change, job)
                else:
                    committed = committing.commit(connection, change)
                keep(connection, change.tenant, change.uid, reply, committed)
                return committed

        return write() if self._writer is None else self._writer.submit(write).result()

    def promote(self, uid: str, number: int, if_match: str | None = None) -> Committed:
        """Point `live` at the version. `if_match` is an AdapterRecord.etag that must still hold.

        Any but the newest version holds there: newer ones are withheld until a person lifts that.

        Raises UnknownAdapter, UnknownVersion, AliasMoved.
        """
        with self._database.writing() as connection:
            return committing.promote(connection, uid, number, if_match)

    def changed(self, seconds: float) -> list[Changed]:
        """The adapters committed to, promoted or deleted in the last `seconds`, each as it is now.

        The database remembers them for CHANGES_KEPT seconds.
        """
        with self._database.reading() as connection:
            now = current_time(connection)
            gone = case((changes.c.gone, 1), else_=0)
            changed = and_(adapters.c.tenant == changes.c.tenant, adapters.c.name == changes.c.name)
            query = (
                select(changes.c.tenant, changes.c.name, adapters.c.uid, adapters.c.epoch, func.max(gone))
                .outerjoin(adapters, changed)
                .where(changes.c.at >= now - timedelta(seconds=seconds))
                .group_by(changes.c.tenant, changes.c.name, adapters.c.uid, adapters.c.epoch)
            )
            return [
                Changed(tenant, name, uid, epoch, bool(gone))
                for tenant, name, uid, epoch, gone in connection.execute(query)
            ]

    def live_versions(self) -> int:
        """How many adapters have a live version."""
        with self._database.reading() as connection:
            return connection.execute(select(func.count(adapters.c.live))).scalar_one()

    def erased_ago(self, uid: str) -> float | None:
        """Seconds since the adapter, or an example of it, was last erased; None if nothing was."""
        query = select(func.max(erasures.c.at)).where(erasures.c.adapter_uid == uid)
        with self._database.reading() as connection:
            at = connection.execute(query).scalar_one()
            return None if at is None else (current_time(connection) - at).total_seconds()

    def referenced(self, uid: str) -> set[Artifact]:
        """The artifacts that rows of the adapter refer to; none if there is no such adapter."""
        with self._database.reading() as connection:
            return set(artifacts_by_id(connection, uid).values()) | uploads_of(connection, uid)
