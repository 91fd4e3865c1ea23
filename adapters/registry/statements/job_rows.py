"""The rows of jobs: which may run, which have ended, and their changes."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, get_args

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    delete,
    func,
    literal_column,
    or_,
    select,
    update,
)

from adapters.registry.errors import LeaseLost, UnknownJob
from adapters.registry.records import Claim, JobKind, JobRecord, JobState
from adapters.registry.schema import jobs, tenants
from adapters.registry.statements.queries import current_time, microseconds
from adapters.storage.artifact import Artifact

MAX_ATTEMPTS = 3
"""Attempts after which a job is assumed to kill its worker, and fails. Released attempts do not count."""
KEPT_JOBS = 1000
"""Number of a tenant's newest jobs that are kept, in addition to queued and running ones."""

_ERASED = "The reason named examples that have been erased."
OPEN: tuple[JobState, ...] = ("queued", "running")
# The states are written into the statement, because no index of open jobs serves one with parameters.
IS_OPEN = jobs.c.state.in_([literal_column(f"'{state}'") for state in OPEN])
HAS_ENDED = jobs.c.state.in_(
    [literal_column(f"'{state}'") for state in get_args(JobState) if state not in OPEN]
)


def forget_examples(connection: Connection, adapter_uid: str, ids: Collection[str] | None) -> None:
    """Remove reported errors that may name one of the examples from the adapter's ended jobs.

    `ids`: the examples' ids; None removes all errors. Ids match as substrings, so a short id also removes
    errors that name other examples.
    """
    ended = and_(jobs.c.adapter_uid == adapter_uid, jobs.c.state.not_in(OPEN))
    told = or_(jobs.c.progress.is_not(None), jobs.c.error_detail.is_not(None))
    columns = (jobs.c.id, jobs.c.progress, jobs.c.error_detail)
    for row in connection.execute(select(*columns).where(ended, told).with_for_update()).all():
        values: dict[str, Any] = {}
        progress = {} if row.progress is None else json.loads(row.progress)
        if errors := progress.get("errors"):
            kept = [one for one in errors if not _names(f"{one['place']} {one['detail']}", ids)]
            if len(kept) < len(errors):
                values["progress"] = json.dumps(progress | {"errors": kept}, allow_nan=False)
        if row.error_detail is not None and _names(row.error_detail, ids):
            values["error_detail"] = _ERASED
        if values:
            update_job(connection, row.id, values)


def _names(text: str, ids: Collection[str] | None) -> bool:
    return ids is None or any(one in text for one in ids)


def held(connection: Connection, claim: Claim) -> JobRecord:
    """Return the claimed job, its row locked until the transaction ends. Raises LeaseLost."""
    mine = and_(jobs.c.id == claim.job.id, jobs.c.attempt == claim.job.attempt, jobs.c.state == "running")
    row = connection.execute(select(jobs).where(mine).with_for_update()).one_or_none()
    # The clock is read after the row is locked, because the lease may expire during the wait for the lock.
    if row is None or row.lease_until <= current_time(connection):
        raise LeaseLost(f"Attempt {claim.job.attempt} of the job {claim.job.id} has no lease any more.")
    return job_record(row)


def end(connection: Connection, claim: Claim, state: JobState, **values: Any) -> None:
    """End the job in this state. Its row must be locked, see `held`."""
    ended = {"state": state, "lease_until": None, "finished_at": current_time(connection)}
    update_job(connection, claim.job.id, ended | values)


def delete_oldest(connection: Connection, tenant: str) -> None:
    """Delete ended jobs of the tenant to make room for one more in KEPT_JOBS."""
    mine = jobs.c.tenant == tenant
    newest = select(jobs.c.id).where(mine).order_by(jobs.c.id.desc()).offset(KEPT_JOBS - 1).limit(1)
    older = jobs.c.id <= newest.scalar_subquery()
    connection.execute(delete(jobs).where(mine, older, jobs.c.state.not_in(OPEN)))


def endings(now: datetime) -> list[tuple[ColumnElement[bool], dict[str, Any]]]:
    """Return which jobs no claim will begin again, and how they end. The first match applies."""
    idle = and_(IS_OPEN, or_(jobs.c.state == "queued", jobs.c.lease_until <= now))
    exhausted = f"{MAX_ATTEMPTS} attempts were started and none finished. The worker's log says why."
    late = "The job did not end before its deadline."
    return [
        (and_(idle, jobs.c.cancel_requested), {"state": "cancelled"}),
        (and_(idle, _begun() >= MAX_ATTEMPTS), _failed("attempts_exhausted", exhausted)),
        (and_(idle, jobs.c.deadline_at <= now), _failed("deadline_exceeded", late)),
    ]


def _failed(code: str, detail: str) -> dict[str, Any]:
    return {"state": "failed", "error_code": code, "error_detail": detail}


def _begun() -> ColumnElement[int]:
    """Return the number of attempts that count."""
    return jobs.c.attempt - jobs.c.released


def end_unclaimable(connection: Connection, now: datetime) -> list[JobRecord]:
    """End the jobs that no claim will begin again; return them."""
    found = []
    for which, how in endings(now):
        ended = select(jobs.c.id).where(which).with_for_update(skip_locked=True)
        statement = update(jobs).where(jobs.c.id.in_(ended)).values(lease_until=None, finished_at=now, **how)
        found += [job_record(row) for row in connection.execute(statement.returning(jobs))]
    return found


def next_job(
    connection: Connection, now: datetime, kinds: Collection[JobKind], max_running: int
) -> JobRecord | None:
    """Return the job to claim, its row locked. Rows locked by others, to end or cancel them, are skipped."""
    # A job with an expired lease does not count as running, or it could block its own next claim.
    leased = select(jobs.c.tenant).where(IS_OPEN, jobs.c.state == "running", jobs.c.lease_until > now)
    quota = select(tenants.c.max_running_jobs).where(tenants.c.name == jobs.c.tenant)
    most = func.coalesce(quota.correlate(jobs).scalar_subquery(), max_running)
    busy = leased.group_by(jobs.c.tenant).having(func.count() >= most)
    others = jobs.alias()
    its_others = and_(others.c.tenant == jobs.c.tenant, others.c.id != jobs.c.id)
    last_turn = select(func.max(others.c.started_at)).where(its_others).correlate(jobs).scalar_subquery()
    query = (
        select(jobs)
        .where(
            IS_OPEN,
            # lease_until is the end of a running job's lease, or of a released job's pause.
            or_(jobs.c.lease_until.is_(None), jobs.c.lease_until <= now),
            jobs.c.kind.in_(kinds),
            jobs.c.tenant.not_in(busy),
            # A tenant without a leased job is not busy, whatever its quota.
            most > 0,
            _may_run(now),
        )
        .order_by(last_turn.nulls_first(), jobs.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else job_record(row)


def _may_run(now: datetime) -> ColumnElement[bool]:
    """Return the condition under which `end_unclaimable` does not end a job, see `endings`."""
    in_time = or_(jobs.c.deadline_at.is_(None), jobs.c.deadline_at > now)
    return and_(~jobs.c.cancel_requested, _begun() < MAX_ATTEMPTS, in_time)


def job_by_id(connection: Connection, tenant: str, job_id: str, *, lock: bool = False) -> JobRecord:
    """Return the tenant's job. Raises UnknownJob."""
    query = select(jobs).where(jobs.c.tenant == tenant, jobs.c.id == job_id)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise UnknownJob(job_id)
    return job_record(row)


def update_job(connection: Connection, job_id: str, values: Mapping[str, Any]) -> JobRecord:
    """Write the values to the job's row; return the job."""
    statement = update(jobs).where(jobs.c.id == job_id).values(**values)
    return job_record(connection.execute(statement.returning(jobs)).one())


def job_record(row: Row[Any]) -> JobRecord:
    """Return the job of a row of the table."""
    values = row._asdict()
    values["request"] = json.loads(row.request)
    values["progress"] = _progress(row)
    values["checkpoint"] = None if row.checkpoint is None else Artifact(*json.loads(row.checkpoint))
    return JobRecord(**values)


def new_id(now: datetime) -> str:
    """Return a UUIDv7 (RFC 9562). Ids sort by time, so an id remains a cursor after its row is deleted."""
    milliseconds, rest = divmod(microseconds(now), 1000)
    fraction = rest * 4096 // 1000
    return f"{milliseconds << 80 | 7 << 76 | fraction << 64 | 2 << 62 | secrets.randbits(62):032x}"


def _progress(row: Any) -> dict[str, Any] | None:
    """Return the last report. For a job that has ended, its estimate of the remaining time is replaced."""
    told: dict[str, Any] | None = None if row.progress is None else json.loads(row.progress)
    if row.state == "succeeded":
        return {**(told or {}), "share": 1.0, "seconds_left": 0.0}
    if told is not None and row.finished_at is not None:
        return {**told, "seconds_left": None}
    return told
