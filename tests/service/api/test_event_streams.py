"""What a stream of a job's events does if the job cannot be read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from starlette.responses import StreamingResponse

from adapters.registry.errors import RegistryUnavailable, UnknownJob
from adapters.registry.records import JobRecord
from service.api.jobs import Events

NOW = datetime(2026, 1, 1, tzinfo=UTC)
QUEUED = JobRecord(
    id="0" * 32,
    tenant="acme",
    adapter_uid="0" * 32,
    adapter="films",
    kind="bulk_adapt",
    state="queued",
    request={},
    progress=None,
    attempt=0,
    lease_until=None,
    cancel_requested=False,
    deadline_at=None,
    version=None,
    error_code=None,
    error_detail=None,
    created_at=NOW,
    started_at=None,
    finished_at=None,
)


class Readings:
    """Answers each reading of a job with the next of these, in place of a JobSubmitter."""

    def __init__(self, found: Sequence[JobRecord | Exception]) -> None:
        self.left = list(found)

    async def job(self, tenant: str, job_id: str) -> JobRecord:
        found = self.left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


async def states(*found: JobRecord | Exception) -> list[str]:
    """The names of the events in the stream of a job that is read so."""
    events = Events(cast(Any, Readings(found)), seconds=60.0)
    answer = cast(StreamingResponse, await events.stream("acme", QUEUED.id))
    parts = cast(AsyncIterator[bytes], answer.body_iterator)
    return [part.split()[1].decode() async for part in parts]


@pytest.mark.anyio
async def test_a_stream_stays_open_while_the_database_is_away() -> None:
    done = replace(QUEUED, state="succeeded", finished_at=NOW)
    assert await states(QUEUED, RegistryUnavailable("away"), done) == ["queued", "succeeded"]


@pytest.mark.anyio
async def test_a_stream_ends_when_its_job_is_erased() -> None:
    assert await states(QUEUED, UnknownJob(QUEUED.id)) == ["queued"]
