"""The registry through PgBouncer in transaction mode, whose clients share a few server connections."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psycopg
import pytest
from psycopg.rows import TupleRow
from sqlalchemy import select

from adapters.registry.errors import RegistryUnavailable
from adapters.registry.registry import Registry
from adapters.registry.schema import tenants
from tests.support.adapters.job_records import claim, submit
from tests.support.adapters.records import append, create
from tests.support.storage import SERVER_CONNECTIONS

THREADS = 16
CALLS = 50
NAMES = [f"t{number}" for number in range(THREADS)]


@pytest.fixture
def pooled(pooled_url: str) -> Iterator[tuple[Registry, Registry]]:
    """The registries of two processes. The second one waits for locks for a second only."""
    first, second = Registry(pooled_url), Registry(pooled_url, patience=1.0)
    first.migrate()
    yield first, second
    first.close()
    second.close()


def client(stack: ExitStack, url: str) -> psycopg.Connection[TupleRow]:
    """Another program's connection, whose transaction holds a server connection until the stack closes."""
    plain = url.replace("+psycopg", "")
    connection = stack.enter_context(psycopg.connect(plain, prepare_threshold=None))
    connection.execute("SELECT 1")
    return connection


def work(registry: Registry, tenant: str) -> None:
    """Reads and writes of one tenant, each of which finds the tenant's own rows and no others."""
    registry.tenants.create(tenant)
    key, _ = registry.tenants.create_key(tenant, ["predict"])
    create(registry, "pets", tenant=tenant)
    for number in range(CALLS // 5):
        alias = registry.resolve(tenant, "pets")
        assert (alias.tenant, alias.name, alias.version) == (tenant, "pets", number + 1)
        adapter = registry.adapter(tenant, "pets")
        append(registry, adapter, f"{tenant}-{number}")
        stored = {example.id for example in registry.all_examples(adapter.uid)[1]}
        assert stored == {"a", "b", *(f"{tenant}-{older}" for older in range(number + 1))}
        held = registry.tenants.find(key.id)
        assert held is not None
        assert held.tenant == tenant
        submit(registry, tenant=tenant)
        # Another thread may have claimed it, and this one then gets the job of another tenant.
        claimed = claim(registry)
        if claimed is not None:
            registry.jobs.heartbeat(claimed, 60, {"of": claimed.job.tenant})
            found = registry.jobs.job(claimed.job.tenant, claimed.job.id)
            assert found.progress == {"of": claimed.job.tenant}
            registry.jobs.succeed(claimed)


def test_many_clients_share_few_server_connections(pooled: tuple[Registry, Registry]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        done = [pool.submit(work, pooled[0], name) for name in NAMES]
        failed = [error for one in done if (error := one.exception()) is not None]
    assert failed == []
    assert [record.name for record in pooled[0].tenants.tenants()] == sorted(NAMES)


def test_nothing_of_a_session_is_left_to_other_clients(
    pooled: tuple[Registry, Registry], pooled_url: str
) -> None:
    for registry in pooled:
        for number in range(20):
            registry.tenants.create(f"{id(registry)}-{number}")
            registry.tenants.tenants()
        registry.erasures.tenant(f"{id(registry)}-0")
        registry.remains.clear_pages()
        assert not registry.remains.uncleared
    with ExitStack() as stack:
        clients = [client(stack, pooled_url) for _ in range(SERVER_CONNECTIONS)]
        settings = (
            "SELECT name, setting FROM pg_settings WHERE source = 'session' AND name ~ 'timeout|commit'"
        )
        assert [one.execute(settings).fetchall() for one in clients] == [[]] * SERVER_CONNECTIONS
        prepared = "SELECT statement FROM pg_prepared_statements"
        assert [one.execute(prepared).fetchall() for one in clients] == [[]] * SERVER_CONNECTIONS
        locks = "SELECT * FROM pg_locks WHERE locktype = 'advisory'"
        assert clients[0].execute(locks).fetchall() == []


def test_each_client_waits_for_locks_as_long_as_it_was_told(
    pooled: tuple[Registry, Registry], pooled_url: str
) -> None:
    patient, hasty = pooled
    patient.tenants.create("acme")
    create(patient)
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        holder = client(stack, pooled_url)
        holder.execute("SELECT FROM adapters FOR UPDATE")
        waiting = pool.submit(append, patient, patient.adapter("acme", "pets"), "c")
        with pytest.raises(RegistryUnavailable):
            append(hasty, hasty.adapter("acme", "pets"), "d")
        assert not waiting.done()
        holder.rollback()
        waiting.result()


def test_an_idle_holder_of_a_lock_is_ended(pooled: tuple[Registry, Registry]) -> None:
    for registry in pooled:
        with registry._database.writing() as connection:
            connection.execute(select(tenants)).all()
            limit = connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar_one()
        assert limit == "1min"


def test_a_direct_connection_has_statements_prepared(postgres_url: str) -> None:
    registry = Registry(postgres_url)
    registry.migrate()
    for _ in range(20):
        registry.tenants.tenants()
    with registry._database.reading() as connection:
        prepared = connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements").scalar_one()
    registry.close()
    assert prepared > 0
