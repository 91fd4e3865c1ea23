"""What several responses share: the JSON response itself, timings, marks and errors of single items.

The types are TypedDicts: they document the API and mypy checks what is built, at the price of a dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NotRequired

from pydantic import Field
from pydantic_core import to_json
from starlette.responses import Response
from typing_extensions import TypedDict

from models.preprocess.limits import InputError

_THREADED = frozenset({"decode", "tokenize", "embed"})  # stages that several threads work on at once

AdapterName = Annotated[str, Field(examples=["mails"])]
VersionNumber = Annotated[int, Field(examples=[3])]
Fingerprint = Annotated[
    str,
    Field(description="Names the backbone's weights, preprocessing and precision; embeddings fit only it."),
]
Epoch = Annotated[
    int, Field(description="Send it as `min_epoch` to another process: it then knows at least this change.")
]
Timings = Annotated[
    dict[str, float],
    Field(
        description="Milliseconds by stage. They add up to `total`, the time that the caller waited. `queue` "
        "is the wait until the work on the inputs began; `other` is time outside the stages. Stages that "
        "several threads work on at once (decode, tokenize, embed) get their shares of the time that passed.",
        examples=[{"tokenize": 0.2, "queue": 0.1, "embed": 3.1, "other": 0.4, "total": 3.8}],
    ),
]


class ErrorAt(TypedDict):
    """One error, and where in the request it is."""

    pointer: Annotated[
        str,
        Field(
            description="A JSON pointer (RFC 6901) into the body; into the query or a form, it begins with "
            "/query or /fields.",
            examples=["/examples/3/image"],
        ),
    ]
    code: Annotated[str, Field(examples=["undecodable_image"])]
    detail: str


class ProblemOut(TypedDict):
    """An error (RFC 9457)."""

    type: Annotated[
        str,
        Field(description="Where the error is explained.", examples=["/docs/errors#unknown_adapter"]),
    ]
    code: Annotated[
        str, Field(description="Names the error; programs may rely on it.", examples=["unknown_adapter"])
    ]
    title: Annotated[str, Field(examples=["Unknown adapter"])]
    status: Annotated[int, Field(description="The HTTP status.", examples=[404])]
    detail: Annotated[str, Field(description="What is wrong, and what to do.")]
    request_id: Annotated[str, Field(description="The same as in the header X-Request-ID, and in the logs.")]
    errors: NotRequired[
        Annotated[list[ErrorAt], Field(description="The parts of the request that are wrong.")]
    ]


class ItemError(TypedDict):
    """Why one input could not be used."""

    code: Annotated[str, Field(examples=["undecodable_image"])]
    detail: str


class FailedItem(TypedDict):
    """Stands in the place of an input that could not be used."""

    error: ItemError


class TruncatedOut(TypedDict):
    """Whether only the start of a text was read."""

    truncated: NotRequired[
        Annotated[
            Literal[True],
            Field(
                description="Present if the text is longer than the backbone reads: only its start was used."
            ),
        ]
    ]


def render(
    value: Mapping[str, object], headers: Mapping[str, str] | None = None, status: int = 200
) -> Response:
    """Return a JSON response."""
    return Response(to_json(value, inf_nan_mode="null"), status, headers, "application/json")


def render_file(content: bytes, name: str) -> Response:
    """Return a file to download."""
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type="application/octet-stream", headers=headers)


def describe_failure(error: InputError) -> FailedItem:
    """Return what stands in the place of an input that could not be used."""
    return {"error": {"code": error.code, "detail": error.detail}}


def describe_truncation(truncated: bool) -> TruncatedOut:
    """Return the mark of a text of which only the start was read; nothing for any other input."""
    return {"truncated": True} if truncated else {}


def to_milliseconds(timings: Mapping[str, float]) -> dict[str, float]:
    """Return milliseconds by stage that add up to `total`, with `other` for time outside the stages.

    Stages that several threads work on at once get their shares of the time that passed.
    """
    stages = {stage: seconds for stage, seconds in timings.items() if stage != "total"}
    total = timings.get("total", sum(stages.values()))
    work = sum(seconds for stage, seconds in stages.items() if stage in _THREADED)
    passed = total - (sum(stages.values()) - work)
    if work > passed:
        share = max(passed, 0.0) / work
        stages = {stage: one * share if stage in _THREADED else one for stage, one in stages.items()}
    found = {stage: round(seconds * 1e3, 3) for stage, seconds in stages.items()}
    whole = round(total * 1e3, 3)
    return {**found, "other": max(0.0, round(whole - sum(found.values()), 3)), "total": whole}
