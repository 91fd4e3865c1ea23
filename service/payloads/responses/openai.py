"""Responses below /v1, in the form of OpenAI's API."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated, Literal, NotRequired

import numpy as np
from pydantic import Field
from pydantic_core import to_json
from starlette.responses import Response
from typing_extensions import TypedDict

from models.arrays import Floats
from models.backbone import Embedded
from models.batching.batcher import Batcher
from service.payloads.responses.answer import ErrorAt, TruncatedOut, describe_truncation, render

ModelName = Annotated[str, Field(examples=["minilm-l6-v2"])]


class OpenAIEmbedding(TruncatedOut):
    """One embedding in OpenAI's form."""

    object: Literal["embedding"]
    index: Annotated[int, Field(description="The place of the text in the request, from 0.")]
    embedding: Annotated[
        list[float] | str,
        Field(description="Numbers, or base64 of little-endian float32 if that was asked for."),
    ]


class OpenAIUsage(TypedDict):
    """Tokens of all texts, special ones included."""

    prompt_tokens: int
    total_tokens: int


class OpenAIResponse(TypedDict):
    """The answer of OpenAI's embeddings endpoint."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: ModelName
    usage: OpenAIUsage


class OpenAIModel(TypedDict):
    """A backbone for texts, in OpenAI's form."""

    id: ModelName
    object: Literal["model"]
    created: Annotated[int, Field(description="When it was exported here, in seconds since 1970.")]
    owned_by: str


class OpenAIModels(TypedDict):
    """The backbones that /v1/embeddings takes."""

    object: Literal["list"]
    data: list[OpenAIModel]


class OpenAIError(TypedDict):
    """An error in OpenAI's form."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: Annotated[
        str | None, Field(description="A JSON pointer to the first of `errors`.", examples=["/input/0"])
    ]
    code: Annotated[str, Field(examples=["model_not_found"])]


class OpenAIProblem(TypedDict):
    """An error below /v1."""

    error: OpenAIError
    errors: NotRequired[
        Annotated[list[ErrorAt], Field(description="The parts of the request that are wrong.")]
    ]


def render_openai_embeddings(model: str, found: Embedded, encoding: str) -> bytes:
    """Return OpenAIResponse as JSON. Slow: run in a thread."""
    rows = found.embeddings.astype(np.float32, copy=False)
    body: OpenAIResponse = {
        "object": "list",
        "data": [],
        "model": model,
        "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
    }
    # Rows are serialised one by one, so that other threads can run in between.
    items = b",".join(
        to_json(_describe_embedding(index, row, encoding, index in found.truncated))
        for index, row in enumerate(rows)
    )
    before, after = to_json(body).split(b'"data":[]')
    return before + b'"data":[' + items + b"]" + after


def render_models(batchers: Mapping[str, Batcher]) -> Response:
    """Return OpenAIModels, the backbones for texts."""
    texts = {name: one for name, one in batchers.items() if one.backbone.spec.kind == "text"}
    body: OpenAIModels = {"object": "list", "data": [_describe_model(*one) for one in texts.items()]}
    return render(body)


def render_model(name: str, batcher: Batcher) -> Response:
    """Return OpenAIModel."""
    return render(_describe_model(name, batcher))


def _describe_embedding(index: int, row: Floats, encoding: str, truncated: bool) -> OpenAIEmbedding:
    return {
        "object": "embedding",
        "index": index,
        "embedding": _encoded(row, encoding),
        **describe_truncation(truncated),
    }


def _describe_model(name: str, batcher: Batcher) -> OpenAIModel:
    exported = int(batcher.backbone.path.stat().st_mtime)
    return {"id": name, "object": "model", "created": exported, "owned_by": "topwork"}


def _encoded(row: Floats, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode()
    values: list[float] = row.tolist()
    return values
