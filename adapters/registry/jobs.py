"""Durable jobs in SQLite or PostgreSQL: queued, claimed under a lease, ended. Rows only: nothing runs here.

queued → running → succeeded | failed | cancelled. A job whose lease expired is claimed again, and a released
attempt puts its job back in the queue. Each claim increments the job's attempt number. A worker with an older
attempt or an expired lease can write nothing more.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, func, insert, or_, select, update

from adapters.registry.database import Database, take_turns
from adapters.registry.errors import JobFinished, TooManyJobs
from adapters.registry.idempotency import PendingReply, check_unanswered, keep
from adapters.registry.records import Claim, Heartbeat, JobKind, JobRecord
from adapters.registry.schema import jobs
from adapters.registry.statements.job_rows import (
    HAS_ENDED,
    IS_OPEN,
    OPEN,
    delete_oldest,
    end,
    end_unclaimable,
    endings,
    held,
    job_by_id,
    job_record,
    new_id,
    next_job,
    update_job,
)
from adapters.registry.statements.queries import adapter_by_name, current_time
from adapters.storage.artifact import Artifact


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
            unfinished = select(func.count()).where(jobs.c.tenant == tenant, IS_OPEN)
            if connection.execute(unfinished).scalar_one() >= max_open:
                raise TooManyJobs(f"{max_open} jobs may be queued or running at once; wait for one to end.")
            delete_oldest(connection, tenant)
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
            job = job_record(connection.execute(insert(jobs).values(values).returning(jobs)).one())
            keep(connection, tenant, adapter.uid, reply, job)
            return job

    def job(self, tenant: str, job_id: str) -> JobRecord:
        """Return one job. Raises UnknownJob, for another tenant's job as for a missing one."""
        with self._database.reading() as connection:
            return job_by_id(connection, tenant, job_id)

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
            return [job_record(row) for row in connection.execute(query)]

    def open_ids(self) -> set[str]:
        """Return the ids of all queued and running jobs, over all tenants."""
        with self._database.reading() as connection:
            return set(connection.execute(select(jobs.c.id).where(IS_OPEN)).scalars())

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
            if connection.execute(select(jobs.c.id).where(IS_OPEN).limit(1)).first() is None:
                return None
        with self._database.writing() as connection:
            # Concurrent claims would both see the tenant below its limit.
            take_turns(connection, "claims")
            now = current_time(connection)
            job = next_job(connection, now, kinds, max_running_per_tenant)
            if job is None:
                return None
            values = {
                "state": "running",
                "attempt": job.attempt + 1,
                "lease_until": now + timedelta(seconds=lease_seconds),
                "started_at": job.started_at or now,
                "progress": None,
            }
            return Claim(update_job(connection, job.id, values))

    def settle(self) -> list[JobRecord]:
        """End and return the jobs that no claim will begin again, so that the caller can report their end."""
        with self._database.reading() as connection:
            # Usually there is none, and then writers must not wait.
            lost = or_(*(which for which, _ in endings(current_time(connection))))
            if connection.execute(select(jobs.c.id).where(IS_OPEN, lost).limit(1)).first() is None:
                return []
        with self._database.writing() as connection:
            return end_unclaimable(connection, current_time(connection))

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
            update_job(connection, job.id, values)
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
            update_job(
                connection, job.id, {"state": "queued", "released": job.released + 1, "lease_until": until}
            )

    def keep_checkpoint(self, claim: Claim, checkpoint: Artifact) -> Artifact | None:
        """Record the job's newest checkpoint; return the one that it replaces. Raises LeaseLost."""
        with self._database.writing() as connection:
            job = held(connection, claim)
            value = json.dumps([checkpoint.sha256, checkpoint.length, checkpoint.nonce])
            update_job(connection, job.id, {"checkpoint": value})
            return job.checkpoint

    def with_spent_checkpoint(self) -> list[JobRecord]:
        """Return the jobs that have ended, over all tenants, and whose checkpoint may still be stored."""
        query = select(jobs).where(HAS_ENDED, jobs.c.checkpoint.is_not(None))
        with self._database.reading() as connection:
            return [job_record(row) for row in connection.execute(query)]

    def forget_checkpoint(self, job: JobRecord) -> None:
        """Record that the checkpoint of an ended job is no longer stored."""
        with self._database.writing() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job.id, HAS_ENDED).values(checkpoint=None))

    def request_cancel(self, tenant: str, job_id: str) -> JobRecord:
        """Cancel a queued job, or ask the worker of a running one to stop. Raises UnknownJob, JobFinished."""
        with self._database.writing() as connection:
            job = job_by_id(connection, tenant, job_id, lock=True)
            if job.state not in OPEN:
                raise JobFinished(f"The job has already ended ({job.state}), so it cannot be cancelled.")
            values: dict[str, Any] = {"cancel_requested": True}
            if job.state == "queued":
                values |= {
                    "state": "cancelled",
                    "lease_until": None,
                    "finished_at": current_time(connection),
                }
            return update_job(connection, job_id, values)


def uploads_of(connection: Connection, *uids: str) -> set[Artifact]:
    """Return the uploaded parts that unfinished jobs of the adapters may still read."""
    query = select(jobs.c.request).where(jobs.c.adapter_uid.in_(uids), IS_OPEN)
    requests = [json.loads(request) for request in connection.execute(query).scalars()]
    return {part for request in requests for part in upload_of(request)}


def stored_for_jobs(connection: Connection, *uids: str) -> set[Artifact]:
    """Return what is stored for jobs of the adapters: uploads of unfinished ones, and checkpoints."""
    query = select(jobs).where(jobs.c.adapter_uid.in_(uids), jobs.c.checkpoint.is_not(None))
    found = {job_record(row).checkpoint for row in connection.execute(query)}
    return uploads_of(connection, *uids) | {one for one in found if one is not None}


def upload_of(request: Mapping[str, Any]) -> tuple[Artifact, ...]:
    """Return the parts of the upload that a job's request names, in order; most jobs have none."""
    return tuple(Artifact(*part) for part in request.get("upload", ()))


def upload_request(parts: Sequence[Artifact]) -> list[list[str | int]]:
    """Return the parts as the value of a job request's "upload"."""
    return [[part.sha256, part.length, part.nonce] for part in parts]
