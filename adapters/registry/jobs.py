"""Durable jobs in SQLite or PostgreSQL: queued, claimed under a lease, ended. Rows only: nothing runs here.

queued → running → succeeded | failed | cancelled. A job whose lease expired is claimed again, and a released
attempt puts its job back in the queue. Each claim increments the job's attempt number. A worker with an older
attempt or an expired lease can write nothing more.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, insert, or_, select, update

from adapters.registry.database import Database, take_turns
from adapters.registry.errors import JobFinished, LeaseLost, TooManyJobs, UnknownJob
from adapters.registry.idempotency import PendingReply, check_unanswered, keep
from adapters.registry.records import Claim, Heartbeat, JobKind, JobRecord, JobState
from adapters.registry.schema import jobs, tenants
from adapters.registry.statements.queries import adapter_by_name, current_time
from adapters.storage.artifact import Artifact

MAX_ATTEMPTS = 3
"""Attempts after which a job is assumed to kill its worker, and fails. Released attempts do not count."""
KEPT_JOBS = 1000
"""Number of a tenant's newest jobs that are kept, in addition to queued and running ones."""

_ERASED = "The reason named examples that were erased since."
_OPEN: tuple[JobState, ...] = ("queued", "running")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Jobs:
    """The jobs of all tenants. Thread-safe, blocking. Times and deadlines are by the database's clock.

    Every method may raise RegistryUnavailable. If a writing method does, its write may have been recorded.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def submit(
        self,
        tenant: str,
        adapter_name: str,
        kind: JobKind,
        request: Mapping[str, Any],
        *,
        deadline_seconds: float | None,
        max_open: int,
        reply: PendingReply[JobRecord] | None = None,
    ) -> JobRecord:
        """Queue a job. Raises UnknownAdapter, and TooManyJobs if max_open jobs are queued or running.

        `reply`: the reply to the request for this job, written in the same transaction. Raises
        AlreadyAnswered if a request with its key was answered before.
        """
        with self._database.writing() as connection:
            # Concurrent submissions would both see room for one more job.
            take_turns(connection, f"jobs of {tenant}")
            check_unanswered(connection, tenant, reply)
            adapter = adapter_by_name(connection, tenant, adapter_name, lock=True)
            unfinished = select(func.count()).where(jobs.c.tenant == tenant, jobs.c.state.in_(_OPEN))
            if connection.execute(unfinished).scalar_one() >= max_open:
                raise TooManyJobs(f"{max_open} jobs may be queued or running at once; wait for one to end.")
            _forget(connection, tenant)
            now = current_time(connection)
            deadline = None if deadline_seconds is None else now + timedelta(seconds=deadline_seconds)
            values = {
                "id": new_id(now),
                "tenant": tenant,
                "adapter_uid": adapter.uid,
                "adapter": adapter.name,
                "kind": kind,
                "state": "queued",
                "request": json.dumps(request, allow_nan=False),
                "attempt": 0,
                "released": 0,
                "cancel_requested": False,
                "deadline_at": deadline,
                "created_at": now,
            }
            job = _record(connection.execute(insert(jobs).values(values).returning(jobs)).one())
            keep(connection, tenant, adapter.uid, reply, job)
            return job

    def job(self, tenant: str, job_id: str) -> JobRecord:
        """Return one job. Raises UnknownJob, for another tenant's job as for a missing one."""
        with self._database.reading() as connection:
            return _known(connection, tenant, job_id)

    def jobs(
        self, tenant: str, adapter: str | None = None, after: str | None = None, limit: int = 100
    ) -> list[JobRecord]:
        """Return the tenant's jobs, newest first; if given, only those of `adapter` or older than `after`."""
        query = select(jobs).where(jobs.c.tenant == tenant).order_by(jobs.c.id.desc()).limit(limit)
        if adapter is not None:
            query = query.where(jobs.c.adapter == adapter)
        if after is not None:
            query = query.where(jobs.c.id < after)
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(query)]

    def counts(self) -> dict[JobState, int]:
        """Return the number of jobs in each state, over all tenants."""
        query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        found: dict[JobState, int] = dict.fromkeys(get_args(JobState), 0)
        found.update((state, count) for state, count in rows)
        return found

    def open_ids(self) -> set[str]:
        """Return the ids of all queued and running jobs, over all tenants."""
        with self._database.reading() as connection:
            return set(connection.execute(select(jobs.c.id).where(jobs.c.state.in_(_OPEN))).scalars())

    def claim(
        self, lease_seconds: float, *, kinds: Collection[JobKind], max_running_per_tenant: int
    ) -> Claim | None:
        """Begin the next attempt of a job that may run, the oldest of its tenant; None if there is none.

        Tenants take turns: the tenant whose last job began the longest ago comes first. Queued jobs and jobs
        with an expired lease may run, unless `settle` ends them. A tenant may have as many jobs under a lease
        as its quota says, or max_running_per_tenant without a quota.
        """
        with self._database.reading() as connection:
            # Every worker polls every second, so an idle poll must not make writers wait.
            if connection.execute(select(jobs.c.id).where(jobs.c.state.in_(_OPEN)).limit(1)).first() is None:
                return None
        with self._database.writing() as connection:
            # Concurrent claims would both see the tenant below its limit.
            take_turns(connection, "claims")
            now = current_time(connection)
            job = _next(connection, now, kinds, max_running_per_tenant)
            if job is None:
                return None
            values = {
                "state": "running",
                "attempt": job.attempt + 1,
                "lease_until": now + timedelta(seconds=lease_seconds),
                "started_at": job.started_at or now,
                "progress": None,
            }
            return Claim(_update(connection, job.id, values))

    def settle(self) -> list[JobRecord]:
        """End and return the jobs that no claim will begin again, so that the caller can report their end."""
        with self._database.reading() as connection:
            # Usually there is none, and then writers must not wait.
            lost = or_(*(which for which, _ in _endings(current_time(connection))))
            if connection.execute(select(jobs.c.id).where(lost).limit(1)).first() is None:
                return []
        with self._database.writing() as connection:
            return _settle(connection, current_time(connection))

    def heartbeat(
        self, claim: Claim, lease_seconds: float, progress: Mapping[str, Any] | None = None
    ) -> Heartbeat:
        """Extend the lease to lease_seconds from now; `progress` replaces the last one. Raises LeaseLost."""
        with self._database.writing() as connection:
            job = held(connection, claim)
            now = current_time(connection)
            values: dict[str, Any] = {"lease_until": now + timedelta(seconds=lease_seconds)}
            if progress is not None:
                values["progress"] = json.dumps(progress, allow_nan=False)
            _update(connection, job.id, values)
            return Heartbeat(job.cancel_requested, job.deadline_at is not None and job.deadline_at <= now)

    def fail(self, claim: Claim, code: str, detail: str) -> None:
        """End the job as failed; another attempt would fail, too. Raises LeaseLost."""
        with self._database.writing() as connection:
            held(connection, claim)
            end(connection, claim, "failed", error_code=code, error_detail=detail)

    def succeed(self, claim: Claim, progress: Mapping[str, Any] | None = None) -> None:
        """End the job as succeeded without a new version. Raises LeaseLost.

        `progress`: replaces the last one.
        """
        told = {} if progress is None else {"progress": json.dumps(progress, allow_nan=False)}
        with self._database.writing() as connection:
            held(connection, claim)
            end(connection, claim, "succeeded", **told)

    def cancelled(self, claim: Claim) -> None:
        """End the job as cancelled, as its tenant requested. Raises LeaseLost."""
        with self._database.writing() as connection:
            held(connection, claim)
            end(connection, claim, "cancelled")

    def release(self, claim: Claim, pause: float = 0.0) -> None:
        """Requeue the job, to run after `pause` seconds. This attempt does not count. Raises LeaseLost."""
        with self._database.writing() as connection:
            job = held(connection, claim)
            until = current_time(connection) + timedelta(seconds=pause)
            _update(
                connection, job.id, {"state": "queued", "released": job.released + 1, "lease_until": until}
            )

    def request_cancel(self, tenant: str, job_id: str) -> JobRecord:
        """Cancel a queued job, or ask the worker of a running one to stop. Raises UnknownJob, JobFinished."""
        with self._database.writing() as connection:
            job = _known(connection, tenant, job_id, lock=True)
            if job.state not in _OPEN:
                raise JobFinished(f"The job has {job.state}; there is nothing left to cancel.")
            values: dict[str, Any] = {"cancel_requested": True}
            if job.state == "queued":
                values |= {
                    "state": "cancelled",
                    "lease_until": None,
                    "finished_at": current_time(connection),
                }
            return _update(connection, job_id, values)


def uploads_of(connection: Connection, adapter_uid: str) -> set[Artifact]:
    """Return the uploaded parts that the adapter's unfinished jobs may still read."""
    query = select(jobs.c.request).where(jobs.c.adapter_uid == adapter_uid, jobs.c.state.in_(_OPEN))
    requests = [json.loads(request) for request in connection.execute(query).scalars()]
    return {part for request in requests for part in upload_of(request)}


def forget_examples(connection: Connection, adapter_uid: str, ids: Collection[str] | None) -> None:
    """Remove reported errors that may name one of the examples from the adapter's ended jobs.

    `ids`: the examples' ids; None removes all errors. Ids match as substrings, so a short id also removes
    errors that name other examples.
    """
    ended = and_(jobs.c.adapter_uid == adapter_uid, jobs.c.state.not_in(_OPEN))
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
            _update(connection, row.id, values)


def _names(text: str, ids: Collection[str] | None) -> bool:
    return ids is None or any(one in text for one in ids)


def upload_of(request: Mapping[str, Any]) -> tuple[Artifact, ...]:
    """Return the parts of the upload that a job's request names, in order; most jobs have none."""
    return tuple(Artifact(*part) for part in request.get("upload", ()))


def upload_request(parts: Sequence[Artifact]) -> list[list[str | int]]:
    """Return the parts as the value of a job request's "upload"."""
    return [[part.sha256, part.length, part.nonce] for part in parts]


def held(connection: Connection, claim: Claim) -> JobRecord:
    """Return the claimed job, its row locked until the transaction ends. Raises LeaseLost."""
    mine = and_(jobs.c.id == claim.job.id, jobs.c.attempt == claim.job.attempt, jobs.c.state == "running")
    row = connection.execute(select(jobs).where(mine).with_for_update()).one_or_none()
    # The clock is read after the row is locked, because the lease may expire during the wait for the lock.
    if row is None or row.lease_until <= current_time(connection):
        raise LeaseLost(f"Attempt {claim.job.attempt} of the job {claim.job.id} has no lease any more.")
    return _record(row)


def end(connection: Connection, claim: Claim, state: JobState, **values: Any) -> None:
    """End the job in this state. Its row must be locked, see `held`."""
    ended = {"state": state, "lease_until": None, "finished_at": current_time(connection)}
    _update(connection, claim.job.id, ended | values)


def _forget(connection: Connection, tenant: str) -> None:
    """Delete ended jobs of the tenant to make room for one more in KEPT_JOBS."""
    mine = jobs.c.tenant == tenant
    newest = select(jobs.c.id).where(mine).order_by(jobs.c.id.desc()).limit(KEPT_JOBS - 1)
    connection.execute(delete(jobs).where(mine, jobs.c.state.not_in(_OPEN), jobs.c.id.not_in(newest)))


def _endings(now: datetime) -> list[tuple[ColumnElement[bool], dict[str, Any]]]:
    """Return which jobs no claim will begin again, and how they end. The first match applies."""
    idle = or_(jobs.c.state == "queued", and_(jobs.c.state == "running", jobs.c.lease_until <= now))
    exhausted = f"{MAX_ATTEMPTS} attempts were begun, and none came to an end; the worker's log says why."
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


def _settle(connection: Connection, now: datetime) -> list[JobRecord]:
    found = []
    for which, how in _endings(now):
        ended = select(jobs.c.id).where(which).with_for_update(skip_locked=True)
        statement = update(jobs).where(jobs.c.id.in_(ended)).values(lease_until=None, finished_at=now, **how)
        found += [_record(row) for row in connection.execute(statement.returning(jobs))]
    return found


def _next(
    connection: Connection, now: datetime, kinds: Collection[JobKind], max_running: int
) -> JobRecord | None:
    """Return the job to claim, its row locked. Rows locked by others, to end or cancel them, are skipped."""
    # A job with an expired lease does not count as running, or it could block its own next claim.
    leased = select(jobs.c.tenant).where(jobs.c.state == "running", jobs.c.lease_until > now)
    quota = select(tenants.c.max_running_jobs).where(tenants.c.name == jobs.c.tenant)
    most = func.coalesce(quota.correlate(jobs).scalar_subquery(), max_running)
    busy = leased.group_by(jobs.c.tenant).having(func.count() >= most)
    others = jobs.alias()
    its_others = and_(others.c.tenant == jobs.c.tenant, others.c.id != jobs.c.id)
    last_turn = select(func.max(others.c.started_at)).where(its_others).correlate(jobs).scalar_subquery()
    query = (
        select(jobs)
        .where(
            jobs.c.state.in_(_OPEN),
            # lease_until is the end of a running job's lease, or of a released job's pause.
            or_(jobs.c.lease_until.is_(None), jobs.c.lease_until <= now),
            jobs.c.kind.in_(kinds),
            jobs.c.tenant.not_in(busy),
            jobs.c.tenant.not_in(select(tenants.c.name).where(tenants.c.max_running_jobs == 0)),
            _may_run(now),
        )
        .order_by(last_turn.nulls_first(), jobs.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else _record(row)


def _may_run(now: datetime) -> ColumnElement[bool]:
    """Return the condition under which `settle` does not end a job, see _endings."""
    in_time = or_(jobs.c.deadline_at.is_(None), jobs.c.deadline_at > now)
    return and_(~jobs.c.cancel_requested, _begun() < MAX_ATTEMPTS, in_time)


def _known(connection: Connection, tenant: str, job_id: str, *, lock: bool = False) -> JobRecord:
    query = select(jobs).where(jobs.c.tenant == tenant, jobs.c.id == job_id)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise UnknownJob(job_id)
    return _record(row)


def _update(connection: Connection, job_id: str, values: Mapping[str, Any]) -> JobRecord:
    statement = update(jobs).where(jobs.c.id == job_id).values(**values)
    return _record(connection.execute(statement.returning(jobs)).one())


def _record(row: Row[Any]) -> JobRecord:
    values = row._asdict()
    values["request"] = json.loads(row.request)
    values["progress"] = _progress(row)
    return JobRecord(**values)


def new_id(now: datetime) -> str:
    """Return a UUIDv7 (RFC 9562). Ids sort by time, so an id remains a cursor after its row is deleted."""
    milliseconds, microseconds = divmod((now - _EPOCH) // _MICROSECOND, 1000)
    fraction = microseconds * 4096 // 1000
    return f"{milliseconds << 80 | 7 << 76 | fraction << 64 | 2 << 62 | secrets.randbits(62):032x}"


def _progress(row: Any) -> dict[str, Any] | None:
    """Return the last report. For a job that has ended, its estimate of the remaining time is replaced."""
    told: dict[str, Any] | None = None if row.progress is None else json.loads(row.progress)
    if row.state == "succeeded":
        return {**(told or {}), "share": 1.0, "seconds_left": 0.0}
    if told is not None and row.finished_at is not None:
        return {**told, "seconds_left": None}
    return told
