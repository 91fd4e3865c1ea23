"""OpenAI's embeddings endpoint, for clients that speak it already."""

from __future__ import annotations

import asyncio

from fastapi import Response

from adapters.predicting import Predicting
from service import answers
from service.errors import Problem
from service.schemas import OpenAIRequest


async def openai_embeddings(tenant: str, predicting: Predicting, body: OpenAIRequest) -> Response:
    """The embeddings of all texts, or a 422 Problem that names those that cannot be embedded."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts:
        raise Problem(422, "no_inputs", "There are no inputs. Send at least one.")
    embedded = await predicting.embed(tenant, body.model, texts)
    backbone = predicting.batchers[body.model].backbone
    if body.dimensions not in (None, backbone.spec.dim):
        detail = f"The embeddings of {body.model!r} have {backbone.spec.dim} dimensions, and no other number."
        raise Problem(422, "invalid_dimensions", detail)
    if embedded.errors:
        blamed = [
            {"pointer": f"/input/{index}", "code": error.code, "detail": error.detail}
            for index, error in sorted(embedded.errors.items())
        ]
        raise Problem(422, "invalid_input", "Some inputs cannot be embedded.", errors=blamed)

    def render() -> bytes:
        return answers.openai(body.model, embedded, body.encoding_format)

    return Response(await asyncio.to_thread(render), media_type="application/json")
