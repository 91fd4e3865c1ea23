"""Adapters, examples, versions and aliases in SQLite or PostgreSQL. Rows only: the store holds the bytes."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable
from concurrent.futures import Executor
from typing import Any

from sqlalchemy import Select, func, select

from adapters.registry.database import Database
from adapters.registry.erasures import Erasures, Receipt
from adapters.registry.idempotency import PendingReply, Replies, check_unanswered, keep
from adapters.registry.identity import Identity
from adapters.registry.jobs import Jobs, stored_for_jobs
from adapters.registry.quotas import Rates
from adapters.registry.records import (
    AdapterRecord,
    Alias,
    Change,
    Claim,
    Committed,
    ExampleRecord,
    VersionRecord,
)
from adapters.registry.schema import adapters, erasures, examples
from adapters.registry.statements import commit as committing
from adapters.registry.statements.changes import News, Position, changes_since
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
from adapters.registry.upkeep.chores import Chores
from adapters.registry.upkeep.remains import Remains
from adapters.registry.upkeep.totals import Totals
from adapters.storage.artifact import Artifact


def new_uid() -> str:
    """Return a uid for an adapter that a Change creates."""
    return uuid.uuid4().hex


class Registry:
    """The rows of all tenants. Thread-safe, blocking: call it from a thread.

    `url`: an SQLAlchemy URL, sqlite:///<path> or postgresql://…. `patience`: lock timeout in seconds.

    Every method may raise RegistryUnavailable. If a writing method does, its write may have been recorded,
    so never delete the artifacts of such a change: if it was not recorded, a sweep removes them later.
    """

    def __init__(self, url: str, *, patience: float = 30.0, writer: Executor | None = None) -> None:
        """`writer`: runs commits instead of the caller's thread.

        A low-priority thread would block all other commits while it waits for a core.
        """
        self._writer = writer
        self._database = Database(url, patience=patience)
        self._jobs = Jobs(self._database)
        self._tenants = Tenants(self._database)
        self._erasures = Erasures(self._database)
        self._remains = Remains(self._database)
        self._chores = Chores(self._database)
        self._totals = Totals(self._database, self._chores)
        self._replies = Replies(self._database)
        self._identity = Identity(self._database)
        self._rates = None if self._database.is_sqlite else Rates(self._database)

    @property
    def jobs(self) -> Jobs:
        """The durable jobs of all tenants, in the same database."""
        return self._jobs

    @property
    def tenants(self) -> Tenants:
        """The tenants and their keys, in the same database."""
        return self._tenants

    @property
    def erasures(self) -> Erasures:
        """The records of erasures, in the same database."""
        return self._erasures

    @property
    def remains(self) -> Remains:
        """What erasures leave behind, in the same database."""
        return self._remains

    @property
    def chores(self) -> Chores:
        """Turns at work that one process does for all that share the database."""
        return self._chores

    @property
    def totals(self) -> Totals:
        """Counts over all tenants."""
        return self._totals

    @property
    def replies(self) -> Replies:
        """The replies to requests with an Idempotency-Key, in the same database."""
        return self._replies

    @property
    def identity(self) -> Identity:
        """The database's identity, which tells whether a store belongs to it."""
        return self._identity

    @property
    def rates(self) -> Rates | None:
        """What tenants use of their rates in all processes. None with SQLite: each process counts alone."""
        return self._rates

    def check_pages(self) -> None:
        """Check a SQLite file for damage. See Database.check_pages."""
        self._database.check_pages()

    def require_current(self) -> None:
        """Check that the tables are those of this release. See Database.require_current."""
        self._database.require_current()

    def migrate(self) -> None:
        """Upgrade the database to the tables of this release. Safe if several processes start at once.

        Raises RegistryTooNew if a newer release has migrated the database.
        """
        self._database.migrate()

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def adapter(self, tenant: str, name: str) -> AdapterRecord:
        """Return the tenant's adapter. Raises UnknownAdapter, also for another tenant's adapter."""
        with self._database.reading() as connection:
            return adapter_by_name(connection, tenant, name)

    def adapters(self, tenant: str, after: str | None = None, limit: int = 100) -> list[AdapterRecord]:
        """Return up to `limit` of the tenant's adapters, ordered by name, after the name `after`.

        Their descriptions of labels are left out, since those of many adapters take much memory.
        """
        query = select_adapter(meanings=False).where(adapters.c.tenant == tenant)
        query = query.order_by(adapters.c.name).limit(limit)
        if after is not None:
            query = query.where(adapters.c.name > after)
        with self._database.reading() as connection:
            return [adapter_record(row) for row in connection.execute(query)]

    def delete_adapter(self, tenant: str, name: str) -> tuple[Receipt, str]:
        """Delete the adapter with all its rows, its jobs included; return the receipt and the adapter's uid.

        The caller then deletes its files (Store.delete_adapter) and drops its alias. Raises UnknownAdapter.
        """
        with self._database.writing() as connection:
            return committing.delete_adapter(connection, tenant, name)

    def examples(
        self, uid: str, after: str | None = None, limit: int = 100, excluded: bool | None = None
    ) -> list[ExampleRecord]:
        """Return up to `limit` examples, ordered by id (code points), after the id `after`.

        `excluded`: True for only those that are set aside, False for only the others.
        """

        def narrow(query: Select[Any]) -> Select[Any]:
            if excluded is not None:
                aside = examples.c.excluded_since
                query = query.where(aside.is_not(None) if excluded else aside.is_(None))
            return (query if after is None else query.where(examples.c.id > after)).limit(limit)

        with self._database.reading() as connection:
            return example_records(connection, uid, narrow)

    def example(self, uid: str, example_id: str) -> ExampleRecord:
        """Return one example. Raises UnknownExample."""
        with self._database.reading() as connection:
            return example_record(connection, uid, example_id)

    def all_examples(self, uid: str) -> tuple[int, list[ExampleRecord]]:
        """Return the revision and all its examples, ordered by id, in one consistent read.

        Raises UnknownAdapter if the adapter has been deleted.
        """
        with self._database.reading() as connection:
            return adapter_by_uid(connection, uid).revision, example_records(connection, uid)

    def places_of(
        self, tenant: str, fingerprint: str, digests: Iterable[str]
    ) -> dict[str, tuple[str, Artifact, int]]:
        """Locate the tenant's embeddings by this backbone: adapter uid, segment and row by input digest."""
        with self._database.reading() as connection:
            return places_of(connection, tenant, fingerprint, digests)

    def versions(self, uid: str) -> list[VersionRecord]:
        """Return the kept versions, newest first."""
        with self._database.reading() as connection:
            return version_records(connection, uid)

    def versions_without(self, uid: str, ids: Collection[str]) -> list[VersionRecord]:
        """Return the versions that remain if these examples are removed, newest first."""
        with self._database.reading() as connection:
            return versions_without(connection, uid, ids)

    def version(self, uid: str, number: int) -> VersionRecord:
        """Return one version. Raises UnknownVersion."""
        with self._database.reading() as connection:
            return version_record(connection, uid, number)

    def resolve(self, tenant: str, name: str, version: int | None = None) -> Alias:
        """Return what a prediction by the live version, or by `version`, needs.

        Raises UnknownAdapter, UnknownVersion.
        """
        with self._database.reading() as connection:
            return alias_of(connection, adapter_by_name(connection, tenant, name), version)

    def commit(
        self, change: Change, *, job: Claim | None = None, reply: PendingReply[Committed] | None = None
    ) -> Committed:
        """Write the change in one durable transaction, entirely or not at all.

        `job`: the job that made the change. With a version, the same transaction records the job's success.
        Raises LeaseLost, before any other error of the change, unless the claim holds the job's newest
        attempt and its lease has not expired. Delete the artifacts then.

        `reply`: the reply to the request that made the change, written in the same transaction. Raises
        AlreadyAnswered if a request with its key was answered before.

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
        """Point `live` at the version. `if_match` is an AdapterRecord.etag that must still be current.

        Promoting any but the newest version is a rollback: newer ones are withheld until a person lifts it.

        Raises UnknownAdapter, UnknownVersion, AliasMoved.
        """
        with self._database.writing() as connection:
            return committing.promote(connection, uid, number, if_match)

    def changed(self, position: Position | None) -> News:
        """Return the changes of all processes since the position that the last call returned.

        None, as in the first call: no changes, and a position to begin with.
        """
        with self._database.reading() as connection:
            return changes_since(connection, position)

    def erased_ago(self, *uids: str) -> dict[str, float]:
        """Return the seconds since each adapter or an example of it was last erased, if anything was."""
        query = select(erasures.c.adapter_uid, func.max(erasures.c.at))
        query = query.where(erasures.c.adapter_uid.in_(uids)).group_by(erasures.c.adapter_uid)
        with self._database.reading() as connection:
            now = current_time(connection)
            return {uid: (now - at).total_seconds() for uid, at in connection.execute(query)}

    def referenced(self, *uids: str) -> set[Artifact]:
        """Return the artifacts that rows of the adapters refer to. A uid without an adapter has none."""
        with self._database.reading() as connection:
            return set(artifacts_by_id(connection, *uids).values()) | stored_for_jobs(connection, *uids)
