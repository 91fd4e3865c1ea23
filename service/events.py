"""A job as it goes on, as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from pydantic_core import to_json
from starlette.responses import StreamingResponse

from adapters.records import JobRecord
from adapters.submitting import Submitting
from service import answers

_POLL_SECONDS = 0.5
# A comment so often keeps proxies from thinking that nothing comes any more.
_SILENCE_SECONDS = 15.0
_FINISHED = ("succeeded", "failed", "cancelled")


async def job_events(submitting: Submitting, tenant: str, job_id: str, seconds: float) -> StreamingResponse:
    """An event named after the job's state with each change, until it has ended or the seconds are over.

    An EventSource asks again by itself, and begins with how the job is then. Raises UnknownJob.
    """
    first = await submitting.job(tenant, job_id)
    stream = _stream(submitting, tenant, first, time.monotonic() + seconds)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _stream(submitting: Submitting, tenant: str, record: JobRecord, end: float) -> AsyncIterator[bytes]:
    sent, quiet = b"", time.monotonic()
    while True:
        event = b"event: %s\ndata: %s\n\n" % (record.state.encode(), to_json(answers.job(record)))
        if event != sent:
            sent, quiet = event, time.monotonic()
            yield event
        elif time.monotonic() - quiet > _SILENCE_SECONDS:
            quiet = time.monotonic()
            yield b":\n\n"
        if record.state in _FINISHED or time.monotonic() > end:
            return
        await asyncio.sleep(_POLL_SECONDS)
        record = await submitting.job(tenant, record.id)
