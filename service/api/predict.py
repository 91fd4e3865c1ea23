"""The endpoints that predict and embed, in this API's form and in OpenAI's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
from fastapi import Request, Response

from adapters.prediction.predictor import Predictor
from models.backbone import Embedded
from models.batching.batcher import Batcher
from models.batching.request import QueueFull
from models.preprocess.limits import InputError
from service.edge.channel import channel_of
from service.errors import MOST_ERRORS, Problem
from service.payloads import requests
from service.payloads.reader import RequestReader
from service.payloads.responses.openai import render_model, render_models, render_openai_embeddings
from service.payloads.responses.predictions import render_embeddings, render_predictions

PART = 32
"""Texts of a request that are embedded together; other tenants get their turns between the parts."""
_SHORTEST_WAIT = 0.05  # seconds


class PredictEndpoints:
    """Inputs in; predictions or embeddings out. Nothing is changed."""

    def __init__(self, predictor: Predictor, reader: RequestReader) -> None:
        self._predictor = predictor
        self._reader = reader

    async def predict(self, request: Request) -> Response:
        """Predict with the live version, or with the version that the request names."""
        channel = channel_of(request.scope)
        tenant = channel.known_tenant()
        if (name := self._reader.adapter(request)) is not None:
            self._predictor.check_room(tenant, name)
        asked = await self._reader.predict(request)
        channel.adapter = asked.query.adapter
        channel.count_items(len(asked.query.inputs))
        found = await self._predictor.predict(tenant, asked.query)
        if all(isinstance(item, InputError) for item in found.items):
            channel.in_vain = True
        return render_predictions(found, raw=asked.raw)

    async def embed(self, request: Request) -> Response:
        """Return the embeddings of inputs."""
        channel = channel_of(request.scope)
        tenant = channel.known_tenant()
        name, inputs, raw = await self._reader.embed(request)
        channel.count_items(len(inputs))
        found = await self._predictor.embed(tenant, name, inputs)
        if len(found.errors) == len(inputs):
            channel.in_vain = True
        batcher = self._predictor.batchers[name]
        content = await asyncio.to_thread(render_embeddings, batcher, name, found, raw=raw)
        return Response(content, media_type="application/json")


class OpenAIEndpoints:
    """The endpoints below /v1."""

    def __init__(self, predictor: Predictor, reader: RequestReader) -> None:
        self._predictor = predictor
        self._reader = reader

    async def create_embeddings(self, request: Request) -> Response:
        """Return the embeddings of texts, in the form of OpenAI's API."""
        channel = channel_of(request.scope)
        tenant = channel.known_tenant()
        asked = await self._reader.openai(request)
        channel.count_items(1 if isinstance(asked.input, str) else len(asked.input))
        return await openai_embeddings(tenant, self._predictor, asked)

    async def list_models(self) -> Response:
        """List the backbones that /v1/embeddings takes."""
        return render_models(self._predictor.batchers)

    async def get_model(self, model: str) -> Response:
        """Return one of the backbones that /v1/embeddings takes."""
        return render_model(model, text_batcher(self._predictor.batchers, model))


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
            f"The embeddings of {asked.model!r} have {backbone.spec.dim} dimensions and cannot be shortened. "
            "Leave `dimensions` out."
        )
        blamed = {"pointer": "/dimensions", "code": "invalid_dimensions", "detail": detail}
        raise Problem(422, "invalid_dimensions", detail, errors=[blamed])
    embedded = await _embed(tenant, predictor, asked.model, texts)
    if embedded.errors:
        is_single = isinstance(asked.input, str)
        errors = [
            {
                "pointer": "/input" if is_single else f"/input/{index}",
                "code": error.code,
                "detail": error.detail,
            }
            for index, error in sorted(embedded.errors.items())[:MOST_ERRORS]
        ]
        raise Problem(422, "invalid_input", "Some inputs cannot be embedded.", errors=errors)

    def render() -> bytes:
        return render_openai_embeddings(asked.model, embedded, asked.encoding_format)

    return Response(await asyncio.to_thread(render), media_type="application/json")


async def _embed(tenant: str, predictor: Predictor, model: str, texts: Sequence[str]) -> Embedded:
    """Embed all texts, part by part.

    If the queue is full, the first part raises QueueFull; later parts wait, until the request times out.
    """
    found: list[Embedded] = []
    errors: dict[int, InputError] = {}
    truncated: set[int] = set()
    start = 0
    while start < len(texts):
        try:
            part = await predictor.embed(tenant, model, texts[start : start + PART])
        except QueueFull as error:
            if start == 0:
                raise
            await asyncio.sleep(max(_SHORTEST_WAIT, error.retry_after))
            continue
        found.append(part)
        errors |= {start + index: error for index, error in part.errors.items()}
        truncated |= {start + index for index in part.truncated}
        start += PART
    return Embedded(
        np.concatenate([part.embeddings for part in found]),
        errors=errors,
        truncated=frozenset(truncated),
        tokens=sum(part.tokens for part in found),
    )
