"""The heartbeat thread of a job records what it reads, independent of the work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, event

from adapters.jobs import lease
from adapters.jobs.lease import Cancelled, DeadlinePassed, Lease, ShuttingDown
from adapters.registry.errors import LeaseLost
from adapters.registry.registry import Registry
from tests.support.adapters.job_records import PAST, begin, expire, now_of, set_row, submit
from tests.support.adapters.records import create
from tests.support.conditions import until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_MOST_SECONDS", 0.05)


@contextmanager
def working(registry: Registry, stopping: threading.Event | None = None) -> Iterator[Lease]:
    create(registry)
    submit(registry, deadline=3_600.0)
    with Lease(registry.jobs, begin(registry), 60.0, stopping or threading.Event()) as held:
        yield held


def test_a_cancelled_job_has_ended_before_its_work_looks(registry: Registry) -> None:
    with working(registry) as held:
        job = registry.jobs.request_cancel("acme", held.claim.job.id)
        assert job.state == "running"
        until(lambda: now_of(registry, job).state == "cancelled")
        until(lambda: isinstance(held.recorded, Cancelled))
        with pytest.raises(Cancelled):
            held.check()
        with pytest.raises(LeaseLost):
            held.tell()


def test_a_job_past_its_deadline_has_ended_before_its_work_looks(registry: Registry) -> None:
    with working(registry) as held:
        job = held.claim.job
        set_row(registry, job, deadline_at=PAST)
        until(lambda: now_of(registry, job).error_code == "deadline_exceeded")
        until(lambda: isinstance(held.recorded, DeadlinePassed))
        with pytest.raises(DeadlinePassed):
            held.check()


def test_a_worker_that_ends_gives_the_job_away_before_its_work_looks(registry: Registry) -> None:
    stopping = threading.Event()
    with working(registry, stopping) as held:
        stopping.set()
        with pytest.raises(ShuttingDown):
            held.check()
        until(lambda: isinstance(held.recorded, ShuttingDown))
        again = begin(registry)
        assert (again.job.id, again.job.attempt, again.job.released) == (held.claim.job.id, 2, 1)


def test_a_lost_lease_ends_the_work_and_records_nothing(registry: Registry) -> None:
    with working(registry) as held:
        expire(registry, held.claim)
        newer = begin(registry)
        until(lambda: isinstance(held._why, LeaseLost))
        with pytest.raises(LeaseLost):
            held.check()
    assert held.recorded is None
    assert now_of(registry, newer.job) == newer.job


def test_a_full_database_costs_heartbeats_and_not_the_lease(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'topwork.db'}")
    registry.migrate()
    full = False

    @event.listens_for(registry._database._engine, "begin")
    def limit(connection: Connection) -> None:
        # SQLite answers the same for a full disk and for a database at its largest.
        connection.exec_driver_sql(f"PRAGMA max_page_count = {1 if full else 1 << 30}")

    with working(registry) as held:
        full = True
        held.report(0.5, {"log": "x" * 100_000})
        until(lambda: "no space left" in caplog.text)
        held.check()
        full = False
        until(lambda: now_of(registry, held.claim.job).progress is not None)
        held.check()
    registry.close()


def test_what_nobody_foresaw_in_a_heartbeat_ends_the_work(registry: Registry) -> None:
    with working(registry) as held:
        held.report(0.5, {"loss": float("nan")})
        until(lambda: held._why is not None)
        with pytest.raises(ValueError, match="JSON"):
            held.check()
