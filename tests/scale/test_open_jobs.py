"""Claims, submissions and ends of jobs cost the same among many tenants, and beside many ended jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text

from adapters.registry.database import Database
from adapters.registry.registry import Registry
from tests.support.adapters.crowd import FEW, MANY, grows_not, populate
from tests.support.adapters.job_records import begin, submit
from tests.support.adapters.records import create
from tests.support.storage import new_schema

# Every tenant of the larger crowd has ended jobs as well: half of them have run.
_ENDED = """INSERT INTO jobs (id, tenant, adapter_uid, adapter, kind, state, request, attempt, released,
        cancel_requested, created_at, started_at, finished_at)
    SELECT 'e' || lpad(to_hex(n * 100 + m), 31, '0'), 't' || n, lpad(to_hex(n), 32, '0'), 'pets', 'fine_tune',
        CASE m % 2 WHEN 0 THEN 'cancelled' ELSE 'succeeded' END, '{{}}', m % 2, 0, false, now(),
        CASE m % 2 WHEN 0 THEN NULL ELSE now() END, now()
    FROM generate_series(1, {tenants}) AS tenants (n), generate_series(1, {ended}) AS ended (m)"""
_ANALYSED = ("VACUUM ANALYZE jobs",)
# What the planner knows of a table that was empty when it was last analysed.
_ANALYSED_EMPTY = (
    "DELETE FROM pg_statistic WHERE starelid = 'jobs'::regclass",
    "UPDATE pg_class SET reltuples = 0, relpages = 0, relallvisible = 0 WHERE oid = 'jobs'::regclass",
)


@pytest.fixture(scope="module")
def crowds(postgres_server: str) -> dict[int, str]:
    """URLs of databases by their number of tenants, who have ended jobs."""
    urls = {count: new_schema(postgres_server) for count in (FEW, MANY)}
    for count, url in urls.items():
        populate(url, count)
        ended = _ENDED.format(tenants=count, ended=1 if count == FEW else 4)
        execute(url, ended, "ALTER TABLE jobs SET (autovacuum_enabled = false)")
    return urls


def execute(url: str, *statements: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def run_a_job(registry: Registry, tenant: str) -> None:
    """Queue a job, claim it, and end it."""
    submit(registry, tenant=tenant)
    assert registry.jobs.open_ids()
    claimed = begin(registry)
    assert claimed.job.tenant == tenant
    registry.jobs.fail(claimed, "diverged", "It did.")


def settle_one(registry: Registry) -> None:
    """End a job that no claim begins again."""
    submit(registry, tenant="t7", deadline=0.0)
    assert [job.tenant for job in registry.jobs.settle()] == ["t7"]


@pytest.mark.parametrize("statistics", [_ANALYSED, _ANALYSED_EMPTY], ids=["analysed", "analysed-empty"])
@pytest.mark.parametrize(
    "work",
    [
        lambda registry: run_a_job(registry, "t5"),
        settle_one,
        lambda registry: registry.jobs.with_spent_checkpoint(),
    ],
    ids=["job", "settle", "checkpoints"],
)
def test_a_job_costs_the_same_among_many_tenants(
    postgres_server: str,
    crowds: dict[int, str],
    work: Callable[[Registry], object],
    statistics: tuple[str, ...],
) -> None:
    for url in crowds.values():
        execute(url, *statistics)
    grows_not(postgres_server, crowds, work)


@dataclass(slots=True)
class Steps:
    """Instructions of SQLite's virtual machine."""

    count: int = 0


@contextmanager
def steps(database: Database) -> Iterator[Steps]:
    """Count the instructions that SQLite executes for the database during the block."""
    counted = Steps()

    def count() -> int:
        counted.count += 1
        return 0

    def attach(connection: Any, record: object, proxy: object) -> None:
        connection.set_progress_handler(count, 1)

    event.listen(database._engine, "checkout", attach)
    yield counted
    event.remove(database._engine, "checkout", attach)
    database._engine.dispose()


@pytest.mark.parametrize("analysed", [False, True])
def test_a_job_costs_the_same_beside_ended_ones_in_sqlite(tmp_path: Path, analysed: bool) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.db'}")
    registry.migrate()
    for tenant in ("acme", "other"):
        create(registry, tenant=tenant)

    def costs() -> tuple[int, int]:
        """Instructions of a submission, and of all else that a job needs."""
        run_a_job(registry, "acme")
        with steps(registry._database) as submission:
            submit(registry)
        with steps(registry._database) as rest:
            registry.jobs.settle()
            registry.jobs.fail(begin(registry), "diverged", "It did.")
        return submission.count, rest.count

    few = costs()
    ended = submit(registry)
    registry.jobs.request_cancel("acme", ended.id)
    with registry._database.writing() as connection:
        same = "adapter_uid, adapter, kind, state, request, attempt, cancel_requested, created_at"
        for tenant in ("acme", "other"):
            connection.exec_driver_sql(
                f"""INSERT INTO jobs (id, tenant, {same}, started_at, released)
                WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 900)
                SELECT printf('%032x', n + {len(tenant)}000), '{tenant}', {same}, n, 0
                FROM jobs, numbers WHERE id = '{ended.id}'"""
            )
        if analysed:
            connection.exec_driver_sql("ANALYZE")
    many = costs()
    registry.close()
    assert many[1] <= 1.5 * few[1]
    # A submission steps through the tenant's kept ids, a thousand at most, but reads none of their rows.
    assert many[0] <= 1.5 * few[0] + 4 * 900
