"""Responses about kept examples."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, NotRequired

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from adapters.examples.target import Target
from adapters.registry.records import AdapterRecord, ExampleRecord
from service.payloads.pages import Next, PageQuery
from service.payloads.responses.answer import AdapterName, render


class TargetOut(TypedDict):
    """An example's target, in the one field that the adapter's task has."""

    label: NotRequired[Annotated[str, Field(description="Of a classification.", examples=["spam"])]]
    labels: NotRequired[
        Annotated[
            Sequence[str], Field(description="Of a multilabel adapter.", examples=[["billing", "urgent"]])
        ]
    ]
    target: NotRequired[Annotated[float, Field(description="Of a regression.", examples=[1.5])]]


class KeptExampleOut(TargetOut):
    """A kept example."""

    id: Annotated[str, Field(examples=["m1"])]
    group: Annotated[
        str | None,
        Field(description="Examples of one group never judge each other.", examples=["customer 17"]),
    ]
    sampled: Annotated[bool, Field(description="Whether it is measured on, and not only learned from.")]
    excluded: Annotated[bool, Field(description="Whether it is set aside: kept, and not learned from.")]
    digest: Annotated[str, Field(description="The sha256 of the input.")]
    created_at: datetime


class KeptInputOut(TypedDict):
    """The input of an example, if inputs are kept."""

    image: NotRequired[Annotated[str, Field(description="The encoded image, in base64.")]]
    text: NotRequired[Annotated[str, Field(examples=["Win a free cruise now!"])]]


class ExampleOut(KeptExampleOut, KeptInputOut):
    """A kept example with its input, if inputs are kept."""


class ExamplesPage(TypedDict):
    """A page of examples in the order of their ids."""

    adapter: AdapterName
    examples: list[KeptExampleOut]
    next: Next


def render_examples(owner: AdapterRecord, records: Sequence[ExampleRecord], page: PageQuery) -> Response:
    """Return ExamplesPage. `records`: as many as `page.wanted`."""
    shown, following = page.cut(records, lambda last: last.id)
    body: ExamplesPage = {
        "adapter": owner.name,
        "examples": [_describe(record) for record in shown],
        "next": following,
    }
    return render(body)


def render_example(record: ExampleRecord, value: bytes | str | None) -> Response:
    """Return ExampleOut. `value`: the input, an image as bytes or a text; None if inputs are not kept."""
    body: ExampleOut = {**_describe(record), **_describe_input(value)}
    return render(body)


def describe_target(value: Target) -> TargetOut:
    """Return the field of an example's target."""
    if isinstance(value, str):
        return {"label": value}
    return {"labels": value} if isinstance(value, tuple) else {"target": value}


def _describe(record: ExampleRecord) -> KeptExampleOut:
    return {
        "id": record.id,
        **describe_target(record.target),
        "group": record.group,
        "sampled": record.sampled,
        "excluded": record.excluded,
        "digest": record.digest,
        "created_at": record.created_at,
    }


def _describe_input(value: bytes | str | None) -> KeptInputOut:
    if isinstance(value, bytes):
        return {"image": base64.b64encode(value).decode()}
    return {} if value is None else {"text": value}
