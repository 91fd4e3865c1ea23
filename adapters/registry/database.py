"""Connections to the registry's database (durable SQLite, or PostgreSQL), transactions and migrations."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, create_engine, event, func, inspect, make_url, select, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from adapters.registry.errors import RegistryTooNew, RegistryTooOld, RegistryUnavailable
from adapters.registry.migrations import HEAD
from adapters.registry.sqlite import DAMAGED, begin, prepare, wal_is_safe, why_unusable
from adapters.storage.artifact import StoreFull

if TYPE_CHECKING:
    import psycopg

# Key of the advisory lock around migrations: arbitrary, but the same in all releases that may start together.
_MIGRATION_LOCK = 0x746F70776F726B
# Largest SQLite file that is checked, in half a second. Larger ones are left to `topwork doctor`.
_CHECKED_BYTES = 128 << 20
_HOW_TO_MIGRATE = "`topwork migrate` makes the tables of this release, and so does the start of the service."


class DatabaseUnusable(RegistryUnavailable):
    """The database is damaged, or this process has no access to it. Waiting does not help."""

    code = "database_unusable"


def take_turns(connection: Connection, name: str) -> None:
    """Take the advisory lock `name`, waiting for other transactions, and hold it until this one ends.

    Does nothing on SQLite, where all writers are serialised anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


class Database:
    """A pool of connections. Thread-safe, blocking. `patience`: lock timeout in seconds.

    Raises RegistryUnavailable if the database does not answer, StoreFull if its disk is full.
    """

    def __init__(self, url: str, *, patience: float = 30.0) -> None:
        self._patience = patience
        self._is_closed = False
        parsed = make_url(url)
        self._sqlite = parsed.get_backend_name() == "sqlite"
        # Threads of this process queue here, because SQLite itself polls the lock at growing intervals.
        self._write_lock = threading.Lock()
        self._file: Path | None = None
        if self._sqlite:
            if parsed.database is None or parsed.database in ("", ":memory:"):
                raise ValueError("the database needs a file: sqlite:///<path>")
            self._file = Path(parsed.database).absolute()
            self._engine = create_engine(parsed, connect_args={"timeout": patience}, pool_size=16)
            event.listen(self._engine, "connect", prepare)
            event.listen(self._engine, "begin", begin)
        else:
            if "connect_timeout" not in parsed.query:
                parsed = parsed.update_query_dict({"connect_timeout": "10"})
            self._engine = create_engine(
                parsed,
                pool_pre_ping=True,
                pool_size=8,
                max_overflow=8,
                pool_timeout=patience,
                # Transactions are begun by `_begin_postgresql`, not by the driver.
                isolation_level="AUTOCOMMIT",
            )
            event.listen(self._engine, "connect", _prepare_postgresql)
            event.listen(self._engine, "begin", self._begin_postgresql)
        event.listen(self._engine, "checkin", self._end_if_closed)

    def close(self) -> None:
        """Close all connections: those that threads are using, as soon as they are done."""
        self._is_closed = True
        self._engine.dispose()

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is a SQLite file."""
        return self._sqlite

    def check_pages(self) -> None:
        """Check the pages of a SQLite file of up to 128 MB for damage. Raises DatabaseUnusable."""
        if self._file is None or not self._file.is_file() or self._file.stat().st_size > _CHECKED_BYTES:
            return
        with self.reading() as connection:
            first: str = connection.execute(text("PRAGMA quick_check(1)")).scalar_one()
        if first != "ok":
            raise DatabaseUnusable(f"The database {self._file} is damaged ({first}). {DAMAGED}")

    def copy_to(self, path: Path) -> None:
        """Copy a snapshot of a SQLite database to a new file. Writers wait for some milliseconds."""
        with (
            self._translated(),
            self._engine.connect() as connection,
            closing(sqlite3.connect(path)) as target,
        ):
            source = connection.connection.driver_connection
            assert isinstance(source, sqlite3.Connection)
            try:
                # All pages are copied in one step: with several, a commit in between would restart the copy.
                source.backup(target, sleep=0.01)
                target.execute("PRAGMA journal_mode = delete")
            except sqlite3.Error as error:
                if _is_full(error):
                    raise StoreFull("There is no space left for the copy of the database.") from error
                raise RegistryUnavailable(f"The database cannot be copied: {error}.") from error

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a transaction for reading, which sees one snapshot of the database throughout."""
        with (
            self._translated(),
            self._engine.connect() as connection,
            connection.execution_options(begin_snapshot=True).begin(),
        ):
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a writing transaction: durable once the block has ended, rolled back if it raises."""
        if not self._sqlite:
            with self._translated(), self._engine.begin() as connection:
                yield connection
            return
        with (
            self._translated(),
            self._in_turn(),
            self._engine.connect() as connection,
            connection.execution_options(begin_immediate=True).begin(),
        ):
            yield connection

    @property
    def revision(self) -> str | None:
        """The schema revision of the tables, None if there are no tables."""
        with self.reading() as connection:
            return _stored_revision(connection)

    def require_current(self) -> None:
        """Check that the tables are those of this release, without changing them.

        Raises RegistryTooOld, RegistryTooNew.
        """
        if self._file is not None and not self._file.exists():
            raise RegistryTooOld(f"There is no database {self._file} yet. {_HOW_TO_MIGRATE}")
        stored = self.revision
        if stored is None:
            raise RegistryTooOld(f"The database has no tables yet. {_HOW_TO_MIGRATE}")
        if stored > HEAD:
            raise _too_new(stored)
        if stored != HEAD:
            raise RegistryTooOld(
                f"The database has the tables of an earlier release (revision {stored}; this release has "
                f"{HEAD}). Use that release, or make a backup with it and then migrate. {_HOW_TO_MIGRATE}"
            )

    def migrate(self) -> None:
        """Upgrade the tables to HEAD. See Registry.migrate."""
        if self._sqlite:
            self._set_journal_mode()
        with self.reading() as connection:
            stored = _stored_revision(connection)
        if stored == HEAD:
            return
        with self.writing() as connection:
            if not self._sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            # Another process may have migrated while this one waited for the lock.
            if _stored_revision(connection) != HEAD:
                _upgrade(connection)

    @contextmanager
    def maintaining(self) -> Iterator[Connection]:
        """Open a connection for statements that cannot run in a transaction, such as VACUUM.

        On SQLite, give them to the driver's connection. Other writers of this process wait.
        """
        turn = self._in_turn() if self._sqlite else nullcontext()
        with self._translated(), turn, self._engine.connect() as connection:
            if not self._sqlite:
                connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            yield connection

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        if not self._write_lock.acquire(timeout=self._patience):
            raise RegistryUnavailable("The database is busy with other changes; try again.")
        try:
            yield
        finally:
            self._write_lock.release()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except PoolTimeout as error:
            raise RegistryUnavailable("All connections to the database are busy; try again.") from error
        # Statements that bypass SQLAlchemy raise the driver's own errors.
        except (DBAPIError, sqlite3.Error) as error:
            original = error.orig if isinstance(error, DBAPIError) else error
            if _is_full(original):
                raise StoreFull(
                    "There is no space left for the database; make room, then try again."
                ) from error
            if self._file is not None and (why := why_unusable(original)):
                raise DatabaseUnusable(f"The database {self._file} {why}") from error
            if isinstance(error, (OperationalError, sqlite3.OperationalError)):
                raise RegistryUnavailable("The database does not answer; try again later.") from error
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                raise RegistryUnavailable("The connection to the database broke; try again later.") from error
            raise

    def _begin_postgresql(self, connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get("isolation_level") == "AUTOCOMMIT":
            return
        snapshot = " ISOLATION LEVEL REPEATABLE READ READ ONLY" if options.get("begin_snapshot") else ""
        # A host may hang while holding a row lock: waiters time out, and the idle holder is ended after 60 s.
        # The timeouts end with the transaction: through a pooler, other clients use the same connection.
        connection.exec_driver_sql(
            f"BEGIN{snapshot}; SET LOCAL lock_timeout = {int(self._patience * 1000)}; "
            "SET LOCAL idle_in_transaction_session_timeout = '60s'"
        )

    def _end_if_closed(self, _: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        if self._is_closed:
            entry.invalidate()

    def _set_journal_mode(self) -> None:
        wanted = "wal" if wal_is_safe(sqlite3.sqlite_version_info) else "delete"
        with self._translated(), self._engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection)
            got = driver.execute(f"PRAGMA journal_mode = {wanted}").fetchone()[0]
        if got != wanted:
            raise RegistryUnavailable(
                f"The database is in {got} mode, which SQLite {sqlite3.sqlite_version} must not use; "
                "stop other programs that have it open, then start again."
            )


def _prepare_postgresql(connection: psycopg.Connection[Any], entry: ConnectionPoolEntry) -> None:
    # A pooler such as PgBouncer gives its clients process ids of its own. The next transaction may run on
    # another server connection, which lacks the statements that the driver has prepared, or has others.
    answered = connection.execute("SELECT pg_backend_pid()").fetchone()
    if answered is None or answered[0] != connection.info.backend_pid:
        connection.prepare_threshold = None


def _stored_revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    stored: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return stored


def _upgrade(connection: Connection) -> None:
    # Importing Alembic takes a third of a second, and a start with current tables does not need it.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    stored = _stored_revision(connection)
    if stored is not None and stored not in known:
        raise _too_new(stored)
    config.attributes["connection"] = connection
    command.upgrade(config, HEAD)


def _too_new(stored: str) -> RegistryTooNew:
    return RegistryTooNew(
        f"The database has revision {stored}, which this release does not know. Use the release "
        "that wrote it."
    )


def _is_full(error: Any) -> bool:
    disk_full = "53100"  # PostgreSQL's SQLSTATE
    sqlite_code, sqlstate = getattr(error, "sqlite_errorcode", None), getattr(error, "sqlstate", None)
    return sqlite_code == sqlite3.SQLITE_FULL or sqlstate == disk_full
