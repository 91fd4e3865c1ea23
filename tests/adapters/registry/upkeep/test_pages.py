"""What an erasure deleted leaves the pages of PostgreSQL's tables, and no other table is touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from sqlalchemy import Connection, create_engine, text

from adapters.registry.idempotency import PendingReply, StoredReply
from adapters.registry.records import AdapterRecord, Committed
from adapters.registry.registry import Registry
from adapters.registry.schema import metadata
from tests.support.adapters.job_records import begin, submit
from tests.support.adapters.records import append, artifact, change, create, example, version
from tests.support.conditions import until

CANARY = "CANARY"
OF_EXAMPLES = {"replies", "jobs", "examples", "versions", "artifacts"}
OF_ADAPTERS = OF_EXAMPLES | {"adapters"}
OF_TENANTS = OF_ADAPTERS | {"changes", "keys", "rates", "tenants"}
# A table with its indexes, and the table of its long values with theirs.
_FILES = """WITH heaps AS (
        SELECT oid FROM pg_class WHERE oid = CAST(:table AS regclass)
        UNION SELECT reltoastrelid FROM pg_class WHERE oid = CAST(:table AS regclass) AND reltoastrelid <> 0
    ) SELECT pg_relation_filepath(oid) FROM heaps
    UNION SELECT pg_relation_filepath(indexrelid) FROM pg_index WHERE indrelid IN (SELECT oid FROM heaps)"""


class Pages:
    """The pages of all tables, as they are on the disk."""

    def __init__(self, url: str) -> None:
        without = {"prepare_threshold": None}  # for a pooler
        self._engine = create_engine(url, isolation_level="AUTOCOMMIT", connect_args=without)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            yield connection

    def with_canaries(self) -> set[str]:
        """The tables whose pages hold a canary."""
        with self.connection() as connection:
            connection.execute(text("CHECKPOINT"))
            return {
                table
                for table in metadata.tables
                for path in connection.scalars(text(_FILES), {"table": table}).all()
                if CANARY.encode()
                in connection.scalar(text("SELECT pg_read_binary_file(:path)"), {"path": path})
            }

    def rewritten_since(self, before: dict[str, int]) -> set[str]:
        return {table for table, file in self.files().items() if file != before[table]}

    def files(self) -> dict[str, int]:
        """The number of each table's file."""
        query = text("SELECT relfilenode FROM pg_class WHERE oid = CAST(:table AS regclass)")
        with self.connection() as connection:
            return {
                table: connection.execute(query, {"table": table}).scalar_one() for table in metadata.tables
            }

    def vacuumed(self) -> set[str]:
        """The tables that have been vacuumed without being rewritten."""
        query = text("SELECT relname FROM pg_stat_user_tables WHERE vacuum_count > 0 AND relid = ANY(:own)")
        with self.connection() as connection:
            own = [connection.scalar(text(f"SELECT '{table}'::regclass::oid")) for table in metadata.tables]
            return set(connection.scalars(query, {"own": own}))


@pytest.fixture
def registry(postgres_url: str) -> Iterator[Registry]:
    opened = Registry(postgres_url)
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
def pages(postgres_url: str) -> Iterator[Pages]:
    found = Pages(postgres_url)
    yield found
    found.close()


def fill(registry: Registry) -> AdapterRecord:
    """An adapter with one example that is a canary, which is all over the tables."""
    adapter = append(registry, create(registry, "canary-adapter", ["kept"], "canary-tenant").adapter).adapter
    learned = replace(version(), report={"labels": [CANARY]})
    reply: PendingReply[Committed] = PendingReply(
        "k" * 64, lambda committed: StoredReply(CANARY.ljust(64, "0"), 200, "{}")
    )
    taught = replace(
        change(adapter), upserts=(example(CANARY, artifact("its segment")),), version=learned, promote=True
    )
    adapter = registry.commit(taught, reply=reply).adapter
    submit(registry, "canary-adapter", tenant="canary-tenant")
    registry.jobs.fail(begin(registry), "refused", f"The example {CANARY} is refused.")
    registry.tenants.create_key("canary-tenant", ["predict"], note=CANARY)
    return adapter


def erase_example(registry: Registry, adapter: AdapterRecord) -> None:
    registry.commit(replace(change(adapter), removals=(CANARY,)))


def test_the_erasure_of_an_example_leaves_other_tables_alone(registry: Registry, pages: Pages) -> None:
    adapter = fill(registry)
    before = pages.files()
    assert pages.with_canaries() >= OF_EXAMPLES - {"artifacts"}
    erase_example(registry, adapter)
    assert pages.with_canaries() >= OF_EXAMPLES - {"artifacts"}, "a deletion leaves the bytes"
    assert registry.remains.clear_pages() == 0.0
    # The note of a key is not the example's.
    assert pages.with_canaries() == {"keys"}
    assert pages.rewritten_since(before) == OF_EXAMPLES
    assert pages.vacuumed() == set()
    before = pages.files()
    assert not registry.remains.uncleared
    assert registry.remains.clear_pages() == 0.0
    assert pages.rewritten_since(before) == set()


def test_the_erasure_of_an_adapter_and_of_a_tenant_reach_their_tables(
    registry: Registry, pages: Pages
) -> None:
    fill(registry)
    before = pages.files()
    registry.delete_adapter("canary-tenant", "canary-adapter")
    registry.remains.clear_pages()
    assert pages.rewritten_since(before) == OF_ADAPTERS
    assert pages.with_canaries() == {"keys"}
    before = pages.files()
    registry.erasures.tenant("canary-tenant")
    registry.remains.clear_pages()
    assert pages.rewritten_since(before) == OF_TENANTS
    assert pages.with_canaries() == set()


def test_large_tables_are_vacuumed_only(registry: Registry, pages: Pages) -> None:
    adapter = fill(registry)
    before = pages.files()
    erase_example(registry, adapter)
    assert registry.remains.clear_pages(rewritten_bytes=1) == 0.0
    assert pages.rewritten_since(before) == set()
    # Statistics arrive a little later.
    until(lambda: pages.vacuumed() == OF_EXAMPLES, 30.0)
    assert not registry.remains.uncleared


def test_a_table_in_use_is_cleared_later_and_nobody_waits(registry: Registry, pages: Pages) -> None:
    adapter = fill(registry)
    erase_example(registry, adapter)
    before = pages.files()
    with pages.connection() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("LOCK TABLE examples IN ACCESS SHARE MODE")
        assert registry.remains.clear_pages() > 0.0
        assert pages.rewritten_since(before) == OF_EXAMPLES - {"examples"}
        assert registry.remains.uncleared
        connection.exec_driver_sql("ROLLBACK")
    assert registry.remains.clear_pages() == 0.0
    assert pages.with_canaries() == {"keys"}
    assert not registry.remains.uncleared


def test_what_an_old_transaction_still_sees_is_cleared_after_it(registry: Registry, pages: Pages) -> None:
    """A rewrite keeps such rows, so it is repeated."""
    adapter = fill(registry)
    with pages.connection() as connection:
        connection.exec_driver_sql("BEGIN ISOLATION LEVEL REPEATABLE READ")
        connection.exec_driver_sql("SELECT id FROM identity")
        erase_example(registry, adapter)
        assert registry.remains.clear_pages() > 0.0
        assert registry.remains.uncleared
        assert "examples" in pages.with_canaries()
        connection.exec_driver_sql("ROLLBACK")
    assert registry.remains.clear_pages() == 0.0
    assert pages.with_canaries() == {"keys"}
    assert not registry.remains.uncleared


def test_pages_are_cleared_through_a_pooler(pooled_url: str) -> None:
    registry, pages = Registry(pooled_url), Pages(pooled_url)
    registry.migrate()
    adapter = fill(registry)
    before = pages.files()
    erase_example(registry, adapter)
    with registry.chores.turn("clear", 0.0) as turn:
        assert turn is not None
        assert registry.remains.clear_pages() == 0.0
    assert pages.rewritten_since(before) == OF_EXAMPLES
    assert pages.with_canaries() == {"keys"}
    pages.close()
    registry.close()
