"""Requests and answers in the form of OpenAI's API."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

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
