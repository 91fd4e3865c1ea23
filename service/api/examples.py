"""Routes of examples and feedback."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Query, Request, Response

from service.api.dependencies import Adapter, Behind, Example, Limit
from service.api.idempotency import IdempotencyGuard, Replying
from service.api.openapi import body, once, problems
from service.components import Components
from service.edge.access import needs
from service.edge.auth import Tenant
from service.errors import Problem
from service.payloads import render, requests
from service.payloads import responses as answer_schemas
from service.payloads.reader import RequestReader


def add_examples(
    api: FastAPI, components: Components, bodies: RequestReader, keyed: IdempotencyGuard
) -> None:
    """Add the routes for examples and feedback."""
    catalog, editor = components.catalog, components.editor

    @api.get(
        "/adapters/{adapter}/examples",
        responses={200: {"model": answer_schemas.ExamplesPage}, **problems(404)},
    )
    @needs("adapt")
    async def examples(
        tenant: Tenant, adapter: Adapter, cursor: Behind, limit: Limit = 100, excluded: bool | None = None
    ) -> Response:
        """The examples in the order of their ids; by `excluded` those set aside alone, or the others."""
        found = await catalog.examples(tenant, adapter, cursor, limit + 1, excluded)
        return render.examples(*found, limit)

    @api.delete(
        "/adapters/{adapter}/examples",
        responses={200: {"model": answer_schemas.RemovalResponse}, **problems(404, 409, 422, 429)},
    )
    @needs("adapt")
    async def remove_examples(
        tenant: Tenant,
        adapter: Adapter,
        id: Annotated[list[str] | None, Query(max_length=1_000)] = None,
        all: bool = False,
    ) -> Response:
        """Erase the examples named by `id` (repeat it), or all, and the versions fitted on them; then fit."""
        return render.removed(await editor.remove(tenant, adapter, to_remove(id, all)))

    @api.get(
        "/adapters/{adapter}/examples/{example:path}",
        responses={200: {"model": answer_schemas.ExampleOut}, **problems(404)},
    )
    @needs("adapt")
    async def example(tenant: Tenant, adapter: Adapter, example: Example) -> Response:
        """One example with its input, if inputs are kept."""
        return render.one_example(*await catalog.example(tenant, adapter, example))

    @api.delete(
        "/adapters/{adapter}/examples/{example:path}",
        responses={200: {"model": answer_schemas.RemovalResponse}, **problems(404, 409, 429)},
    )
    @needs("adapt")
    async def remove_example(tenant: Tenant, adapter: Adapter, example: Example) -> Response:
        """Erase one example, and the versions that were fitted on it; then fit what is left."""
        return render.removed(await editor.remove(tenant, adapter, [example]))

    @api.patch(
        "/adapters/{adapter}/examples/{example:path}",
        openapi_extra=once(body(requests.AmendRequest), 200),
        responses={200: {"model": answer_schemas.AdaptResponse}, **problems(400, 404, 409, 415, 422, 429)},
    )
    @needs("adapt")
    async def amend_example(request: Request, tenant: Tenant, adapter: Adapter, example: Example) -> Response:
        """Relabel one example, set it aside or take it back, or group it; then fit."""
        return await keyed.answer(
            request, tenant, lambda asked, reply: amend(asked, tenant, adapter, example, reply)
        )

    async def amend(request: Request, tenant: str, adapter: str, example: str, reply: Replying) -> Response:
        wanted = await bodies.amendment(request)
        done = await editor.amend(tenant, adapter, example, wanted, reply(render.revised))
        return render.revised(done)

    @api.post(
        "/adapters/{adapter}/feedback",
        openapi_extra=once(body(requests.FeedbackRequest), 200),
        responses={200: {"model": answer_schemas.AdaptResponse}, **problems(400, 404, 409, 415, 422, 429)},
    )
    @needs("adapt")
    async def feedback(request: Request, tenant: Tenant, adapter: Adapter) -> Response:
        """Tell what is right for an input, or for a kept example."""
        return await keyed.answer(
            request, tenant, lambda asked, reply: correct(asked, tenant, adapter, reply)
        )

    async def correct(request: Request, tenant: str, adapter: str, reply: Replying) -> Response:
        told = await bodies.feedback(request)
        return render.revised(await editor.feedback(tenant, adapter, told, reply(render.revised)))


def to_remove(ids: list[str] | None, everything: bool) -> list[str] | None:
    """Return the ids to remove, None for all. Raises a 422 Problem unless exactly one of the two is given."""
    if bool(ids) == everything:
        raise Problem(422, "invalid_request", "Name the examples as `id`, or say `all=true`.")
    return ids
