"""Responses about adapters and their versions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, cast

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from adapters.examples.target import Task, Weights
from adapters.registry.records import AdapterRecord, VersionRecord
from models.spec import Kind
from service.payloads.pages import Next, PageQuery
from service.payloads.responses.answer import AdapterName, Epoch, Fingerprint, render
from service.payloads.responses.reports import Report


class AdapterOut(TypedDict):
    """An adapter."""

    adapter: AdapterName
    backbone: Annotated[str, Field(examples=["minilm-l6-v2"])]
    fingerprint: Fingerprint
    kind: Kind
    task: Task
    keep_inputs: bool
    answer_accuracy: Annotated[
        float, Field(description="The accuracy wanted of answers that are not abstained on.", examples=[0.95])
    ]
    weights: Annotated[
        Weights | dict[str, float],
        Field(description="none, balanced, or the costs that were given, by label.", examples=["none"]),
    ]
    examples: Annotated[int, Field(description="Examples kept, those that are set aside included.")]
    live: Annotated[int | None, Field(description="The version that /predict uses.", examples=[3])]
    rolled_back_at: Annotated[
        datetime | None,
        Field(
            description="When a person made an older version live. Newer ones are withheld (`rolled_back`) "
            "until a person promotes one, restores a version or says `always`. null: nothing is withheld for "
            "that."
        ),
    ]
    revision: Annotated[int, Field(description="Grows with every change of the examples.")]
    epoch: Epoch
    created_at: datetime


class AdapterDetailOut(AdapterOut):
    """An adapter with what its labels mean."""

    labels: Annotated[
        dict[str, str | None],
        Field(
            description="The names that it learns from: a description by label, null for a name alone.",
            examples=[{"refund": "a customer wants money back", "delivery": None}],
        ),
    ]


class AdaptersOut(TypedDict):
    """A page of adapters in the order of their names."""

    adapters: list[AdapterOut]
    next: Next


class VersionOut(TypedDict):
    """A version. It never changes."""

    version: Annotated[int, Field(examples=[3])]
    live: bool
    method: Annotated[str, Field(description="linear_probe or fine_tune.", examples=["linear_probe"])]
    backbone: Annotated[str, Field(examples=["minilm-l6-v2"])]
    fingerprint: Fingerprint
    revision: Annotated[int, Field(description="The revision of the examples that it was fitted on.")]
    labels: Annotated[int, Field(description="The number of labels; 0 for a regression.")]
    sha256: Annotated[str, Field(description="The sha256 of the head's file.")]
    bytes: Annotated[int, Field(description="The length of that file.")]
    created_at: datetime
    report: Annotated[Report, Field(description="How well it predicts, by the adapter's task.")]


class VersionsOut(TypedDict):
    """The versions that are kept, the newest first."""

    adapter: AdapterName
    versions: list[VersionOut]


def render_adapters(records: Sequence[AdapterRecord], page: PageQuery) -> Response:
    """Return AdaptersOut, a page. `records`: as many as `page.wanted`."""
    shown, following = page.cut(records, lambda last: last.name)
    body: AdaptersOut = {"adapters": [_describe_adapter(record) for record in shown], "next": following}
    return render(body)


def render_adapter(record: AdapterRecord) -> Response:
    """Return AdapterDetailOut with the ETag of its alias."""
    labels = {label: description or None for label, description in record.meanings.items()}
    body: AdapterDetailOut = {**_describe_adapter(record), "labels": labels}
    return render(body, {"ETag": record.etag})


def render_versions(owner: AdapterRecord, records: Sequence[VersionRecord]) -> Response:
    """Return VersionsOut."""
    body: VersionsOut = {
        "adapter": owner.name,
        "versions": [_describe_version(record, owner) for record in records],
    }
    return render(body)


def render_version(owner: AdapterRecord, record: VersionRecord) -> Response:
    """Return VersionOut."""
    return render(_describe_version(record, owner))


def _describe_adapter(record: AdapterRecord) -> AdapterOut:
    return {
        "adapter": record.name,
        "backbone": record.backbone,
        "fingerprint": record.fingerprint,
        "kind": record.kind,
        "task": record.task,
        "keep_inputs": record.keep_inputs,
        "answer_accuracy": record.answer_accuracy,
        "weights": dict(record.costs) or record.weights,
        "examples": record.examples,
        "live": record.live,
        "rolled_back_at": record.rolled_back_at,
        "revision": record.revision,
        "epoch": record.epoch,
        "created_at": record.created_at,
    }


def _describe_version(record: VersionRecord, owner: AdapterRecord) -> VersionOut:
    return {
        "version": record.number,
        "live": record.number == owner.live,
        "method": record.method,
        "backbone": record.backbone,
        "fingerprint": record.fingerprint,
        "revision": record.revision,
        "labels": record.labels,
        "sha256": record.artifact.sha256,
        "bytes": record.artifact.length,
        "created_at": record.created_at,
        "report": cast(Report, dict(record.report)),
    }
