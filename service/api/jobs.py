"""Routes of jobs."""

from __future__ import annotations

from fastapi import FastAPI, Response

from adapters.jobs.submission import JobSubmitter
from service.api.dependencies import Behind, Job, JobsAdapter, Limit
from service.api.events import Events, brief
from service.api.openapi import problems
from service.edge.access import needs
from service.edge.auth import Tenant
from service.payloads import render
from service.payloads import responses as answer_schemas


def add_jobs(api: FastAPI, submitter: JobSubmitter, streams: Events) -> None:
    """Add the routes for jobs, which outlive their request."""

    @api.get("/jobs", responses={200: {"model": answer_schemas.JobsOut}, **problems(422)})
    @needs("adapt")
    async def jobs(tenant: Tenant, cursor: Behind, adapter: JobsAdapter, limit: Limit = 100) -> Response:
        """The tenant's jobs, the newest first; what is wrong with each line of an upload is left out."""
        found = await submitter.jobs(tenant, adapter, cursor, limit + 1)
        return render.jobs([brief(one) for one in found], limit)

    @api.get("/jobs/{job}", responses={200: {"model": answer_schemas.JobOut}, **problems(404)})
    @needs("adapt")
    async def job(tenant: Tenant, job: Job) -> Response:
        """One job."""
        return render.one_job(await submitter.job(tenant, job))

    @api.get(
        "/jobs/{job}/events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {}}}, **problems(404, 429)},
    )
    @needs("adapt")
    async def events(tenant: Tenant, job: Job) -> Response:
        """The job with each change, as server-sent events, until it has ended."""
        return await streams.stream(tenant, job)

    @api.post("/jobs/{job}/cancel", responses={200: {"model": answer_schemas.JobOut}, **problems(404, 409)})
    @needs("adapt")
    async def cancel(tenant: Tenant, job: Job) -> Response:
        """Cancel a job; one that runs ends within seconds, and publishes nothing."""
        return render.one_job(await submitter.cancel(tenant, job))
