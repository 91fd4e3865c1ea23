"""The endpoints of jobs, and a job's progress as server-sent events.

See https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import replace

from pydantic_core import to_json
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapters.jobs.submission import JobSubmitter
from adapters.registry.errors import RegistryUnavailable, UnknownJob
from adapters.registry.records import JobRecord
from service.api.dependencies import Job, JobsAdapter, Page, Tenant
from service.edge.concurrency import ConcurrencyLimit
from service.payloads.responses.jobs import describe_job, render_job, render_jobs

_STREAMS = 50
# The default of `max_jobs`: a tenant can follow all of its open jobs.
_STREAMS_OF_A_TENANT = 10
# Workers report progress every two seconds.
_POLL_SECONDS = 1.0
# Interval of keep-alive comments, without which proxies may drop a quiet stream.
_SILENCE_SECONDS = 15.0


class Events:
    """The open event streams. For one event loop. `seconds`: maximum duration of a stream."""

    def __init__(self, submitter: JobSubmitter, seconds: float) -> None:
        self._submitter = submitter
        self._seconds = seconds
        self._slots = ConcurrencyLimit("streams", _STREAMS, _STREAMS_OF_A_TENANT)
        self._closing = asyncio.Event()

    async def stream(self, tenant: str, job_id: str) -> Response:
        """Stream an event, named after the job's state, at each change until the job ends or time is up.

        An EventSource reconnects by itself, and starts with the job's current state. Raises UnknownJob, and a
        429 Problem if too many streams are open.
        """
        with ExitStack() as slot:
            slot.enter_context(self._slots.take(tenant))
            first = await self._submitter.job(tenant, job_id)
            return _Stream(self._events(tenant, first), slot.pop_all())

    def close(self) -> None:
        """End every stream at once, because the server waits for all open responses before it stops."""
        self._closing.set()

    async def _events(self, tenant: str, record: JobRecord) -> AsyncIterator[bytes]:
        end = time.monotonic() + self._seconds
        sent, quiet = b"", time.monotonic()
        while True:
            event = b"event: %s\ndata: %s\n\n" % (record.state.encode(), to_json(describe_job(brief(record))))
            if event != sent:
                sent, quiet = event, time.monotonic()
                yield event
            elif time.monotonic() - quiet > _SILENCE_SECONDS:
                quiet = time.monotonic()
                yield b":\n\n"
            if record.finished_at is not None or time.monotonic() > end:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _POLL_SECONDS)
            if self._closing.is_set():
                return
            try:
                record = await self._submitter.job(tenant, record.id)
            except RegistryUnavailable:
                # The stream stays open, because browsers do not reconnect after a 503.
                continue
            except UnknownJob:
                # The job was erased with its adapter.
                return


class _Stream(StreamingResponse):
    """Releases its slot however it ends: a generator that was never started would not run its `finally`."""

    def __init__(self, events: AsyncIterator[bytes], slot: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._slot:
            await super().__call__(scope, receive, send)


class JobEndpoints:
    """What is done with jobs once they are submitted."""

    def __init__(self, submitter: JobSubmitter, events: Events) -> None:
        self._submitter = submitter
        self._events = events

    async def list_jobs(self, tenant: Tenant, page: Page, adapter: JobsAdapter) -> Response:
        """List the jobs of the tenant, the newest first, without the errors of single lines of an upload."""
        found = await self._submitter.jobs(tenant, adapter, page.after, page.wanted)
        return render_jobs([brief(one) for one in found], page)

    async def get_job(self, tenant: Tenant, job: Job) -> Response:
        """Return one job."""
        return render_job(await self._submitter.job(tenant, job))

    async def stream_job_events(self, tenant: Tenant, job: Job) -> Response:
        """Send the job as server-sent events, one for each change, until it has ended."""
        return await self._events.stream(tenant, job)

    async def cancel_job(self, tenant: Tenant, job: Job) -> Response:
        """Cancel a job. A running job ends within seconds, and publishes nothing."""
        return render_job(await self._submitter.cancel(tenant, job))


def brief(record: JobRecord) -> JobRecord:
    """Return the job without the errors of an upload's lines, for lists of jobs and repeated events."""
    if record.progress is None or "errors" not in record.progress:
        return record
    progress = {name: value for name, value in record.progress.items() if name != "errors"}
    return replace(record, progress=progress)
