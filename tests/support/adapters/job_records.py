"""Jobs of a registry, and the times of their leases."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import update

from adapters.registry.records import Claim, JobKind, JobRecord
from adapters.registry.registry import Registry
from adapters.registry.schema import jobs

KINDS: tuple[JobKind, ...] = ("fine_tune", "bulk_adapt")
PAST = datetime(2000, 1, 1, tzinfo=UTC)


def submit(
    registry: Registry,
    adapter: str = "pets",
    *,
    tenant: str = "acme",
    kind: JobKind = "fine_tune",
    deadline: float | None = None,
    max_open: int = 100,
) -> JobRecord:
    request = {"epochs": 3, "name": "ünï"}
    return registry.jobs.submit(tenant, adapter, kind, request, deadline_seconds=deadline, max_open=max_open)


def claim(
    registry: Registry, *, lease: float = 60, kinds: Sequence[JobKind] = KINDS, max_running: int = 100
) -> Claim | None:
    return registry.jobs.claim(lease, kinds=kinds, max_running_per_tenant=max_running)


def begin(registry: Registry, lease: float = 60) -> Claim:
    claimed = claim(registry, lease=lease)
    assert claimed is not None
    return claimed


def set_row(registry: Registry, job: JobRecord, **values: Any) -> None:
    with registry._database.writing() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(**values))


def expire(registry: Registry, claimed: Claim) -> None:
    """As if the worker had been stopped for longer than its lease."""
    set_row(registry, claimed.job, lease_until=PAST)


def now_of(registry: Registry, job: JobRecord) -> JobRecord:
    return registry.jobs.job(job.tenant, job.id)
