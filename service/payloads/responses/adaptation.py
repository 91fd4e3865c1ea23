"""Responses to changes of an adapter's examples: adapt, feedback, removal, restore, rebase, erasure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, NotRequired, cast

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from adapters.adaptation.commands import AdaptOutcome, RevisionResult
from adapters.adaptation.rollback import Gone, RestoredVersion
from adapters.examples.validation import RejectedExample
from adapters.registry.erasures import Receipt
from service.payloads.responses.answer import (
    AdapterName,
    Epoch,
    ItemError,
    Timings,
    render,
    to_milliseconds,
)
from service.payloads.responses.reports import Report

_MOST_MISSING = 1_000  # missing examples listed in an answer


class RejectedOut(ItemError):
    """A posted example that was not used."""

    index: Annotated[int, Field(description="Its place in the request, from 0.")]
    id: Annotated[str | None, Field(description="Its id, if the request gives one.")]


class ExamplesOut(TypedDict):
    """What became of the examples."""

    total: Annotated[
        int, Field(description="Examples kept now, those that are set aside included.", examples=[200])
    ]
    added: Annotated[int, Field(examples=[2])]
    replaced: Annotated[int, Field(description="Examples whose id was known.")]
    removed: int
    rejected: Annotated[list[RejectedOut], Field(description="Examples that cannot be used, and why.")]
    truncated: NotRequired[
        Annotated[
            int,
            Field(description="Texts among those sent of which the backbone reads only the start, if any."),
        ]
    ]


class AdaptResponse(TypedDict):
    """The new version, if one was fitted, and what became of the examples."""

    adapter: AdapterName
    version: Annotated[int | None, Field(description="null: nothing was fitted.", examples=[3])]
    live: Annotated[bool, Field(description="Whether the new version is the live one.")]
    backbone: Annotated[str, Field(examples=["minilm-l6-v2"])]
    epoch: Epoch
    examples: ExamplesOut
    report: Annotated[
        Report | None, Field(description="How well the new version predicts, by the adapter's task.")
    ]
    timing_ms: Timings


class RemovalResponse(AdaptResponse):
    """What remains after a removal of examples."""

    gone: Annotated[
        Sequence[int], Field(description="Versions that were fitted on removed examples; they are deleted.")
    ]
    erasure: Annotated[str | None, Field(description="The id of the receipt; null: nothing was removed.")]


class MissingOut(TypedDict):
    """An example of a version that cannot be restored."""

    id: str
    reason: Annotated[
        Gone,
        Field(
            description="not_kept: a replacement has forgotten it. other_input: its id has another input now."
        ),
    ]


class RestoredExamplesOut(TypedDict):
    """What became of the examples when a version was restored."""

    total: Annotated[int, Field(description="Examples kept now, those that are set aside included.")]
    in_use: Annotated[int, Field(description="The version's examples, without the missing ones.")]
    taken_back: Annotated[int, Field(description="Examples that were set aside before.")]
    relabelled: Annotated[int, Field(description="Examples with their target as it was in the version.")]
    set_aside: Annotated[int, Field(description="Examples that the version does not have.")]
    missing_total: Annotated[int, Field(description="Examples that cannot be restored.")]
    missing: Annotated[list[MissingOut], Field(description="The first thousand of them.")]


class RestoreResponse(TypedDict):
    """A version that is live again, with its examples."""

    adapter: AdapterName
    version: Annotated[int, Field(examples=[3])]
    live: bool
    epoch: Epoch
    examples: RestoredExamplesOut


class ErasureOut(TypedDict):
    """The receipt of an erasure: what was deleted. A restored backup deletes it again."""

    erasure: Annotated[
        str, Field(description="The receipt's id.", examples=["019abf6e1a2b7c3d9e4f5a6b7c8d9e0f"])
    ]
    tenant: Annotated[str, Field(examples=["acme"])]
    erased_at: datetime
    adapters: int
    examples: int
    versions: int
    jobs: int
    keys: int


def render_adapted(outcome: AdaptOutcome) -> Response:
    """Return AdaptResponse."""
    return render(_describe(outcome.revised, outcome.rejected, outcome.timings))


def render_revised(done: RevisionResult) -> Response:
    """Return AdaptResponse for feedback, an amended example or a rebase."""
    return render(_describe(done, [], done.timings))


def render_removed(done: RevisionResult) -> Response:
    """Return RemovalResponse."""
    committed = done.committed
    body: RemovalResponse = {
        **_describe(done, [], done.timings),
        "gone": committed.erased,
        "erasure": committed.erasure,
    }
    return render(body)


def render_restored(done: RestoredVersion) -> Response:
    """Return RestoreResponse."""
    rollback, missing = done.rollback, done.rollback.missing
    body: RestoreResponse = {
        "adapter": done.adapter.name,
        "version": done.version,
        "live": True,
        "epoch": done.adapter.epoch,
        "examples": {
            "total": done.adapter.examples,
            "in_use": rollback.in_use,
            "taken_back": rollback.taken_back,
            "relabelled": rollback.relabelled,
            "set_aside": rollback.set_aside,
            "missing_total": len(missing),
            "missing": [{"id": one.id, "reason": one.reason} for one in missing[:_MOST_MISSING]],
        },
    }
    return render(body)


def render_erased(receipt: Receipt) -> Response:
    """Return ErasureOut."""
    body: ErasureOut = {
        "erasure": receipt.id,
        "tenant": receipt.tenant,
        "erased_at": receipt.at,
        "adapters": receipt.adapters,
        "examples": receipt.examples,
        "versions": receipt.versions,
        "jobs": receipt.jobs,
        "keys": receipt.keys,
    }
    return render(body)


def describe_examples(done: RevisionResult, rejected: Sequence[RejectedExample]) -> ExamplesOut:
    """Return what became of the examples of a request."""
    committed = done.committed
    found: ExamplesOut = {
        "total": done.adapter.examples,
        "added": committed.added,
        "replaced": committed.replaced,
        "removed": committed.removed,
        "rejected": [
            {"index": one.index, "id": one.id, "code": one.code, "detail": one.detail} for one in rejected
        ],
    }
    if done.truncated:
        found["truncated"] = done.truncated
    return found


def _describe(
    done: RevisionResult, rejected: Sequence[RejectedExample], timings: Mapping[str, float]
) -> AdaptResponse:
    made = done.version
    return {
        "adapter": done.adapter.name,
        "version": None if made is None else made.number,
        "live": done.live,
        "backbone": done.adapter.backbone,
        "epoch": done.adapter.epoch,
        "examples": describe_examples(done, rejected),
        "report": None if made is None else cast(Report, dict(made.report)),
        "timing_ms": to_milliseconds(timings),
    }
