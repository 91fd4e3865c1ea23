"""A PostgreSQL database with many tenants, and what statements cost in it, in pages instead of seconds.

Pages are the same on every machine. TOPWORK_TEST_SCALE=full compares a thousand tenants with a million;
otherwise it is a thousand with fifty thousand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import create_engine, text

from adapters.registry.database import Database
from adapters.registry.registry import Registry

FEW = 1_000
MANY = 1_000_000 if os.environ.get("TOPWORK_TEST_SCALE") == "full" else 50_000
GROWTH = 1.5
# Trees of indexes have one level more where there are a thousand times as many rows.
LEVELS = 30

# One row of each kind for tenant number n. Every tenth tenant has had a job, which has ended.
_ROWS = (
    "INSERT INTO tenants (name, created_at) SELECT 't' || n, now() FROM {numbers}",
    """INSERT INTO keys (id, tenant, secret_sha256, scopes, note, created_at)
       SELECT lpad(to_hex(n), 16, '0'), 't' || n, repeat('0', 64), 'predict', '', now() FROM {numbers}""",
    """INSERT INTO adapters (uid, tenant, name, backbone, fingerprint, kind, task, keep_inputs, revision,
           next_version, live, epoch, examples, created_at)
       SELECT lpad(to_hex(n), 32, '0'), 't' || n, 'pets', 'minilm-l6-v2', repeat('f', 64), 'text',
           'classification', true, 1, 2, 1, n, 2, now() FROM {numbers}""",
    """INSERT INTO artifacts (adapter_uid, sha256, nonce, length)
       SELECT lpad(to_hex(n), 32, '0'), lpad(to_hex(n), 64, '0'), repeat('0', 16), 8000 FROM {numbers}""",
    """INSERT INTO versions (adapter_uid, number, revision, method, backbone, fingerprint, artifact_id,
           report, labels, created_at)
       SELECT adapter_uid, 1, 1, 'linear_probe', 'minilm-l6-v2', repeat('f', 64), id, '{{}}', 2, now()
       FROM artifacts""",
    """INSERT INTO jobs (id, tenant, adapter_uid, adapter, kind, state, request, attempt, released,
           cancel_requested, created_at, started_at, finished_at)
       SELECT lpad(to_hex(n), 32, '0'), 't' || n, lpad(to_hex(n), 32, '0'), 'pets', 'fine_tune', 'succeeded',
           '{{}}', 1, 0, false, now(), now(), now() FROM {numbers} WHERE n % 10 = 0""",
)


def populate(url: str, tenants: int) -> None:
    """Make the current tables in an empty database, with tenants t1, t2 and so on.

    Each has a key, and an adapter "pets" with a live version. Uids and ids are the number in hexadecimal.
    """
    database = Database(url)
    database.migrate()
    database.close()
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for rows in _ROWS:
            connection.execute(text(rows.format(numbers=f"generate_series(1, {tenants}) AS numbers (n)")))
        connection.execute(text("VACUUM ANALYZE"))
    engine.dispose()


@dataclass(slots=True)
class Cost:
    """What statements did since the block began. `pages`: of tables and indexes, from memory or disk."""

    pages: int = 0
    statements: int = 0
    slowest: str = ""


@contextmanager
def cost(server: str) -> Iterator[Cost]:
    """Count the statements that the cluster runs during the block, and the pages that they touch.

    `server`: the cluster's URL, see `postgres_server`. Nothing else may use the cluster meanwhile.
    """
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    counted = Cost()
    with engine.connect() as connection:
        connection.execute(text("CREATE EXTENSION IF NOT EXISTS pg_stat_statements"))
        connection.execute(text("SELECT pg_stat_statements_reset()"))
        yield counted
        rows = connection.execute(
            text(
                """SELECT shared_blks_hit + shared_blks_read + temp_blks_read + temp_blks_written,
                       calls, query
                   FROM pg_stat_statements WHERE query NOT LIKE '%pg_stat_statements%' ORDER BY 1 DESC"""
            )
        ).all()
    engine.dispose()
    counted.pages = sum(int(pages) for pages, _, _ in rows)
    counted.statements = sum(int(calls) for _, calls, _ in rows)
    counted.slowest = "; ".join(f"{pages} pages: {query}" for pages, _, query in rows[:3])


def grows_not(server: str, crowds: dict[int, str], work: Callable[[Registry], object]) -> None:
    """Assert that the work touches about as many pages among many tenants as among few."""
    pages = {}
    told = {}
    for count, url in crowds.items():
        registry = Registry(url)
        work(registry)  # a first call, which also reads the catalogue of tables
        with cost(server) as counted:
            work(registry)
        registry.close()
        pages[count], told[count] = counted.pages, counted.slowest
    assert pages[MANY] <= GROWTH * pages[FEW] + LEVELS, f"{pages}: {told[MANY]}"
