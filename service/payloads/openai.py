"""Requests and answers in the form of OpenAI's API."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.responses import Response

from models.arrays import Floats
from models.backbone import Embedded
from models.batching.batcher import Batcher
from service.payloads.render import Json, answer, truncation
from service.payloads.responses import TRUNCATED, ErrorAt


class OpenAIEmbedding(BaseModel):
    """One embedding in OpenAI's form."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    truncated: Literal[True] | None = Field(default=None, description=TRUNCATED)


class OpenAIUsage(BaseModel):
    """Tokens of all texts, special ones included."""

    prompt_tokens: int
    total_tokens: int


class OpenAIResponse(BaseModel):
    """The answer of OpenAI's embeddings endpoint."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class OpenAIModel(BaseModel):
    """A backbone for texts, in OpenAI's form."""

    id: str = Field(examples=["minilm-l6-v2"])
    object: Literal["model"]
    created: int = Field(description="When it was exported here, in seconds since 1970.")
    owned_by: str


class OpenAIModels(BaseModel):
    """The backbones that /v1/embeddings takes."""

    object: Literal["list"]
    data: list[OpenAIModel]


class OpenAIError(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="A JSON pointer to the first of `errors`.", examples=["/input/0"])
    code: str = Field(examples=["model_not_found"])


class OpenAIProblem(BaseModel):
    """An error below /v1."""

    error: OpenAIError
    errors: list[ErrorAt] = Field(default_factory=list)


def embeddings(model: str, found: Embedded, encoding: str) -> bytes:
    """Return OpenAIResponse as JSON. Slow: run in a thread."""
    embeddings = found.embeddings.astype(np.float32, copy=False)
    items = [
        to_json(
            {
                "object": "embedding",
                "index": index,
                "embedding": _encoded(row, encoding),
                **truncation(index in found.truncated),
            }
        )
        for index, row in enumerate(embeddings)
    ]
    usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    tail = to_json({"model": model, "usage": usage})
    return b'{"object":"list","data":[' + b",".join(items) + b"]," + tail[1:]


def models(batchers: Mapping[str, Batcher]) -> Response:
    """Return OpenAIModels, the backbones for texts."""
    texts = {name: one for name, one in batchers.items() if one.backbone.spec.kind == "text"}
    return answer({"object": "list", "data": [_model(*one) for one in texts.items()]})


def model(name: str, batcher: Batcher) -> Response:
    """Return OpenAIModel."""
    return answer(_model(name, batcher))


def _model(name: str, batcher: Batcher) -> Json:
    exported = int(batcher.backbone.path.stat().st_mtime)
    return {"id": name, "object": "model", "created": exported, "owned_by": "topwork"}


def _encoded(row: Floats, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode()
    values: list[float] = row.tolist()
    return values
