"""Responses about jobs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal, NotRequired, cast

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from adapters.adaptation.commands import AdaptOutcome
from adapters.jobs.submission import Submitted
from adapters.registry.records import JobKind, JobRecord, JobState
from service.payloads.pages import Next, PageQuery
from service.payloads.responses.adaptation import ExamplesOut, describe_examples
from service.payloads.responses.answer import AdapterName, render


class UploadError(TypedDict):
    """A line or file of an upload that could not be used."""

    place: Annotated[
        str, Field(description="The line, or the file's name.", examples=["line 17", "spam/3.png"])
    ]
    code: Annotated[str, Field(examples=["label_missing"])]
    detail: str


class UploadFormat(TypedDict):
    """How an upload was read."""

    encoding: NotRequired[Annotated[str, Field(description="Of a table or of lines.", examples=["utf-8"])]]
    encodings: NotRequired[
        Annotated[
            dict[str, int],
            Field(description="Of a zip: its text files by encoding.", examples=[{"utf-8": 12}]),
        ]
    ]
    delimiter: NotRequired[Annotated[str, Field(description="Of a table.", examples=[";"])]]
    columns: NotRequired[
        Annotated[
            dict[str, str],
            Field(
                description="Of a table: the column that each field was read from.",
                examples=[{"text": "Betreff"}],
            ),
        ]
    ]
    ignored_columns: NotRequired[Annotated[list[str], Field(description="Of a table: its other columns.")]]


class JobProgress(TypedDict):
    """How far the newest attempt of a job is. A field appears as soon as it is known."""

    share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="The share done: 1 once the job has succeeded, else what it reached.",
            examples=[0.25],
        ),
    ]
    seconds_left: Annotated[
        float | None,
        Field(description="An estimate. null: unknown, or the job failed or was cancelled.", examples=[95.5]),
    ]
    phase: NotRequired[
        Annotated[
            int | str,
            Field(
                description="Of a fine_tune: 1 (the head), 2 (everything) or 3 (the refit). Of a bulk_adapt: "
                "store or fit.",
                examples=[2, "store"],
            ),
        ]
    ]
    epoch: NotRequired[Annotated[int, Field(description="Of a fine_tune: epochs done in this phase.")]]
    epochs: NotRequired[Annotated[int, Field(description="Of a fine_tune: the most epochs of this phase.")]]
    loss: NotRequired[
        Annotated[
            float | None, Field(description="Of a fine_tune: on the training examples; null in phase 1.")
        ]
    ]
    held_out_accuracy: NotRequired[
        Annotated[float | None, Field(description="Of a fine_tune: null where it was not measured.")]
    ]
    outcome: NotRequired[
        Annotated[
            Literal["no_better"],
            Field(
                description="Of a fine_tune that made no version: it found nothing better than the backbone."
            ),
        ]
    ]
    stored: NotRequired[Annotated[int, Field(description="Of a bulk_adapt: examples stored.")]]
    rejected: NotRequired[Annotated[int, Field(description="Of a bulk_adapt: examples that cannot be used.")]]
    skipped: NotRequired[
        Annotated[int, Field(description="Of a bulk_adapt: files in a zip that an operating system added.")]
    ]
    truncated: NotRequired[
        Annotated[
            int, Field(description="Of a bulk_adapt: texts of which the backbone reads only the start.")
        ]
    ]
    format: NotRequired[
        Annotated[UploadFormat, Field(description="Of a bulk_adapt: how the upload was read.")]
    ]
    errors: NotRequired[
        Annotated[
            list[UploadError],
            Field(
                description="Of a bulk_adapt: why examples cannot be used. Only where one job is asked for."
            ),
        ]
    ]


class JobErrorOut(TypedDict):
    """Why a job failed."""

    code: Annotated[str, Field(examples=["diverged"])]
    detail: str


JobId = Annotated[str, Field(examples=["019abf6e1a2b7c3d9e4f5a6b7c8d9e0f"])]
MadeVersion = Annotated[int | None, Field(description="The version that it made.", examples=[4])]


class JobOutcome(TypedDict):
    """What a callback says of a job that has ended; the fields are those of the job."""

    id: JobId
    adapter: AdapterName
    kind: JobKind
    state: Literal["succeeded", "failed", "cancelled"]
    version: MadeVersion
    error: JobErrorOut | None


class JobOut(TypedDict):
    """A job: work that outlives its request."""

    id: JobId
    adapter: AdapterName
    kind: JobKind
    state: JobState
    attempt: Annotated[int, Field(description="Attempts so far; a job whose worker died is tried again.")]
    cancel_requested: bool
    progress: Annotated[JobProgress | None, Field(description="null before the first report.")]
    version: MadeVersion
    error: JobErrorOut | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class SubmittedOut(JobOut):
    """A job that was queued, and what became of the examples sent with it."""

    examples: Annotated[
        ExamplesOut | None, Field(description="null for a bulk upload, and if no examples were sent.")
    ]


class JobsOut(TypedDict):
    """A page of jobs, the newest first, without `progress.errors`."""

    jobs: list[JobOut]
    next: Next


def describe_job(record: JobRecord) -> JobOut:
    """Return one job."""
    return {
        "id": record.id,
        "adapter": record.adapter,
        "kind": record.kind,
        "state": record.state,
        "attempt": record.attempt,
        "cancel_requested": record.cancel_requested,
        "progress": None if record.progress is None else cast(JobProgress, dict(record.progress)),
        "version": record.version,
        "error": _describe_error(record),
        "created_at": record.created_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
    }


def render_submitted(record: JobRecord, stored: AdaptOutcome | None = None) -> Response:
    """Return SubmittedOut with the job's Location. `stored`: what became of the examples sent with it."""
    body: SubmittedOut = {
        **describe_job(record),
        "examples": None if stored is None else describe_examples(stored.revised, stored.rejected),
    }
    return render(body, job_headers(record.id), status=202)


def render_fine_tune(done: Submitted) -> Response:
    """Return SubmittedOut for a fine-tune."""
    return render_submitted(*done)


def render_job(record: JobRecord) -> Response:
    """Return JobOut."""
    return render(describe_job(record))


def render_jobs(records: Sequence[JobRecord], page: PageQuery) -> Response:
    """Return JobsOut, a page. `records`: as many as `page.wanted`."""
    shown, following = page.cut(records, lambda last: last.id)
    body: JobsOut = {"jobs": [describe_job(record) for record in shown], "next": following}
    return render(body)


def job_headers(job_id: str) -> dict[str, str]:
    """Return the headers that say where and when to ask for a job."""
    return {"Location": f"/jobs/{job_id}", "Retry-After": "5"}


def _describe_error(record: JobRecord) -> JobErrorOut | None:
    if record.error_code is None:
        return None
    return {"code": record.error_code, "detail": record.error_detail or ""}
