"""Totals over all tenants: jobs and live versions, counted for all processes."""

from __future__ import annotations

from datetime import timedelta
from typing import get_args

from sqlalchemy import select, update

from adapters.registry.records import Claim, JobState
from adapters.registry.registry import Registry
from adapters.registry.schema import chores
from adapters.registry.upkeep.totals import FORGOTTEN_AFTER, Counted
from tests.support.adapters.job_records import begin, submit
from tests.support.adapters.records import create

NO_JOBS: dict[JobState, int] = dict.fromkeys(get_args(JobState), 0)


def age(registry: Registry, seconds: float) -> None:
    """As if the last count had been so much earlier."""
    past = timedelta(seconds=seconds)
    with registry._database.writing() as connection:
        row = connection.execute(select(chores.c.done_at, chores.c.due_at)).one()
        values = {"done_at": row.done_at - past, "due_at": row.due_at - past}
        connection.execute(update(chores).values(values))


def begin_one(registry: Registry) -> Claim:
    submit(registry)
    return begin(registry)


def test_jobs_are_counted_by_state(registry: Registry) -> None:
    create(registry)
    create(registry, tenant="other")
    registry.jobs.fail(begin_one(registry), "code", "detail")
    registry.jobs.succeed(begin_one(registry))
    registry.jobs.cancelled(begin_one(registry))
    begin_one(registry)
    submit(registry)
    submit(registry, tenant="other")
    registry.totals.count()
    counts: dict[JobState, int] = {"queued": 2, "running": 1, "succeeded": 1, "failed": 1, "cancelled": 1}
    assert registry.totals.counted() == Counted(2, counts)
    assert registry.totals.open_jobs() == {"queued": 2, "running": 1}


def test_all_are_counted_once_a_minute_and_open_jobs_are_fresh(registry: Registry, registry_url: str) -> None:
    other = Registry(registry_url)
    assert registry.totals.counted() is None
    registry.totals.count()
    create(registry)
    submit(registry)
    for one in (registry, other):
        one.totals.count()
        assert one.totals.counted() == Counted(0, NO_JOBS)
        assert one.totals.open_jobs() == {"queued": 1, "running": 0}
    age(registry, 61.0)
    other.totals.count()
    assert registry.totals.counted() == Counted(1, NO_JOBS | {"queued": 1})
    other.close()


def test_a_count_that_is_not_repeated_is_forgotten(registry: Registry) -> None:
    registry.totals.count()
    age(registry, FORGOTTEN_AFTER - 60.0)
    assert registry.totals.counted() is not None
    age(registry, 61.0)
    assert registry.totals.counted() is None
