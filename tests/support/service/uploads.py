"""Bulk uploads."""

from __future__ import annotations

from service.payloads.responses.jobs import JobOut
from tests.support.service.client import Caller, Json
from tests.support.service.document import exactly
from tests.support.service.fine_tunes import until_finished

CSV = {"Content-Type": "text/csv; charset=utf-8"}
NDJSON = {"Content-Type": "application/x-ndjson"}
ZIP = {"Content-Type": "application/zip"}


def upload(teacher: Caller, query: str, content: bytes, headers: dict[str, str]) -> Json:
    """Upload examples; the job once it has ended."""
    response = teacher.http.post(f"/adapt?{query}", content=content, headers=headers)
    assert response.status_code == 202, response.text
    job: Json = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert (job["kind"], job["version"], job["error"]) == ("bulk_adapt", None, None)
    job = until_finished(teacher, job)
    exactly(JobOut, job)
    return job
