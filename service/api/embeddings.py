"""OpenAI-compatible routes for embeddings and models, for clients that already use that API."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
from fastapi import FastAPI, Request, Response

from adapters.prediction.predictor import Predictor
from models.backbone import Embedded
from models.batching.batcher import Batcher
from models.batching.request import Overloaded
from models.preprocess.limits import InputError
from service.api.openapi import body, openai_problems
from service.edge.access import needs
from service.edge.auth import count_items, tenant_of
from service.errors import Problem
from service.payloads import openai, requests
from service.payloads.reader import RequestReader

PART = 32
"""Texts of a request that are embedded together; other tenants get their turns between the parts."""
_MOST_ERRORS = 100
_SHORTEST_WAIT = 0.05  # seconds


def add_openai(api: FastAPI, predictor: Predictor, bodies: RequestReader) -> None:
    """Add the routes below /v1."""
    batchers = predictor.batchers

    @api.post(
        "/v1/embeddings",
        openapi_extra=body(requests.OpenAIRequest),
        responses={200: {"model": openai.OpenAIResponse}, **openai_problems(404, 413, 415, 422, 429)},
    )
    @needs("predict", direct=True)
    async def embeddings(request: Request) -> Response:
        """The embeddings of texts, as OpenAI's clients ask for them."""
        tenant = await tenant_of(request)
        asked = await bodies.openai(request)
        count_items(request, 1 if isinstance(asked.input, str) else len(asked.input))
        return await openai_embeddings(tenant, predictor, asked)

    @api.get("/v1/models", responses={200: {"model": openai.OpenAIModels}, **openai_problems()})
    @needs("key")
    async def models() -> Response:
        """The backbones that /v1/embeddings takes."""
        return openai.models(batchers)

    @api.get(
        "/v1/models/{model:path}",
        responses={200: {"model": openai.OpenAIModel}, **openai_problems(404)},
    )
    @needs("key")
    async def model(model: str) -> Response:
        """One of them."""
        return openai.model(model, text_batcher(batchers, model))


def text_batcher(batchers: Mapping[str, Batcher], model: str) -> Batcher:
    """Return the batcher of a text backbone. Raises a 404 Problem if there is none of that name."""
    batcher = batchers.get(model)
    if batcher is None or batcher.backbone.spec.kind != "text":
        raise Problem(
            404, "model_not_found", f"There is no model {model[:100]!r} for texts. GET /v1/models lists them."
        )
    return batcher


async def openai_embeddings(tenant: str, predictor: Predictor, asked: requests.OpenAIRequest) -> Response:
    """Return the embeddings of all texts. Raises a 422 Problem that names texts that cannot be embedded."""
    backbone = text_batcher(predictor.batchers, asked.model).backbone
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    if not texts:
        raise Problem(422, "no_inputs", "There are no inputs. Send at least one.")
    if asked.dimensions not in (None, backbone.spec.dim):
        detail = (
            f"The embeddings of {asked.model!r} have {backbone.spec.dim} dimensions, and are not shortened. "
            "Leave `dimensions` out."
        )
        blamed = {"pointer": "/dimensions", "code": "invalid_dimensions", "detail": detail}
        raise Problem(422, "invalid_dimensions", detail, errors=[blamed])
    embedded = await _embed(tenant, predictor, asked.model, texts)

    def render() -> bytes:
        return openai.embeddings(asked.model, embedded, asked.encoding_format)

    return Response(await asyncio.to_thread(render), media_type="application/json")


async def _embed(tenant: str, predictor: Predictor, model: str, texts: Sequence[str]) -> Embedded:
    """Embed all texts, part by part.

    If the queue is full, the first part raises Overloaded; later parts wait, until the request times out.
    """
    found: list[Embedded] = []
    errors: dict[int, InputError] = {}
    truncated: set[int] = set()
    start = 0
    while start < len(texts):
        try:
            part = await predictor.embed(tenant, model, texts[start : start + PART])
        except Overloaded as error:
            if start == 0:
                raise
            await asyncio.sleep(max(_SHORTEST_WAIT, error.retry_after))
            continue
        found.append(part)
        errors |= {start + index: error for index, error in part.errors.items()}
        truncated |= {start + index for index in part.truncated}
        start += PART
    if errors:
        blamed = [
            {"pointer": f"/input/{index}", "code": error.code, "detail": error.detail}
            for index, error in sorted(errors.items())[:_MOST_ERRORS]
        ]
        raise Problem(422, "invalid_input", "Some inputs cannot be embedded.", errors=blamed)
    return Embedded(
        np.concatenate([part.embeddings for part in found]),
        truncated=frozenset(truncated),
        tokens=sum(part.tokens for part in found),
    )
