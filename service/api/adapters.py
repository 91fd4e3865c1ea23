"""Routes of adapters, their versions and their live alias."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from adapters.prediction.export import Format
from service.api.dependencies import Adapter, Behind, Expected, Limit, Version
from service.api.idempotency import IdempotencyGuard, Replying
from service.api.openapi import body, once, problems
from service.components import Components
from service.edge.access import needs
from service.edge.auth import Tenant
from service.payloads import render, requests
from service.payloads import responses as answer_schemas
from service.payloads.reader import RequestReader


def add_adapters(
    api: FastAPI, components: Components, bodies: RequestReader, keyed: IdempotencyGuard
) -> None:
    """Add the routes for adapters, their versions and their live alias."""
    catalog, editor, exporter = components.catalog, components.editor, components.exporter
    eraser, restorer = components.eraser, components.restorer

    @api.get("/adapters", responses={200: {"model": answer_schemas.AdaptersOut}})
    @needs("key")
    async def adapters(tenant: Tenant, cursor: Behind, limit: Limit = 100) -> Response:
        """The tenant's adapters in the order of their names."""
        return render.adapters(await catalog.adapters(tenant, cursor, limit + 1), limit)

    @api.get("/adapters/{adapter}", responses={200: {"model": answer_schemas.AdapterOut}, **problems(404)})
    @needs("key")
    async def adapter(tenant: Tenant, adapter: Adapter) -> Response:
        """One adapter. Its entity tag stands for what `live` points to."""
        return render.one_adapter(await catalog.adapter(tenant, adapter))

    @api.delete("/adapters/{adapter}", responses={200: {"model": answer_schemas.ErasureOut}, **problems(404)})
    @needs("adapt")
    async def delete_adapter(tenant: Tenant, adapter: Adapter) -> Response:
        """Erase an adapter with its examples, versions and jobs: all of it is gone within 5 seconds."""
        return render.erased(await eraser.adapter(tenant, adapter))

    @api.get(
        "/adapters/{adapter}/versions",
        responses={200: {"model": answer_schemas.VersionsOut}, **problems(404)},
    )
    @needs("key")
    async def versions(tenant: Tenant, adapter: Adapter) -> Response:
        """The versions that are kept, with their reports, the newest first."""
        return render.versions(*await catalog.versions(tenant, adapter))

    @api.get(
        "/adapters/{adapter}/versions/{version}",
        responses={200: {"model": answer_schemas.VersionOut}, **problems(404)},
    )
    @needs("key")
    async def version(tenant: Tenant, adapter: Adapter, version: Version) -> Response:
        """One version with its report."""
        return render.one_version(*await catalog.version(tenant, adapter, version))

    @api.get(
        "/adapters/{adapter}/versions/{version}/export",
        response_class=Response,
        responses={200: {"content": {"application/octet-stream": {}}}, **problems(404, 409)},
    )
    @needs("adapt")
    async def export(tenant: Tenant, adapter: Adapter, version: Version, format: Format = "onnx") -> Response:
        """The version as one ONNX file, from prepared inputs to probabilities, or its head as safetensors."""
        content = await exporter.export(tenant, adapter, version, format)
        return render.file(content, f"{adapter}-{version}.{format}")

    @api.put(
        "/adapters/{adapter}/aliases/live",
        openapi_extra=body(requests.PromoteRequest),
        responses={200: {"model": answer_schemas.AdapterOut}, **problems(404, 412, 415, 422)},
    )
    @needs("adapt")
    async def promote(request: Request, tenant: Tenant, adapter: Adapter, etag: Expected) -> Response:
        """Promote a version, or roll back to it: then newer ones are withheld until a person lifts that."""
        wanted = await bodies.model(request, requests.PromoteRequest)
        return render.one_adapter(await catalog.promote(tenant, adapter, wanted.version, etag))

    @api.post(
        "/adapters/{adapter}/versions/{version}/restore",
        openapi_extra=once({}, 200),
        responses={200: {"model": answer_schemas.RestoreResponse}, **problems(400, 404, 409, 412)},
    )
    @needs("adapt")
    async def restore(
        request: Request, tenant: Tenant, adapter: Adapter, version: Version, etag: Expected
    ) -> Response:
        """Make a version live, and the examples those that it was fitted on; the others are set aside."""

        async def go_back(asked: Request, reply: Replying) -> Response:
            await bodies.nothing(asked)
            done = await restorer.restore(tenant, adapter, version, etag, reply(render.restored))
            return render.restored(done)

        return await keyed.answer(request, tenant, go_back)

    @api.post(
        "/adapters/{adapter}/rebase",
        openapi_extra=body(requests.RebaseRequest),
        responses={200: {"model": answer_schemas.AdaptResponse}, **problems(404, 409, 415, 422, 429)},
    )
    @needs("adapt")
    async def rebase(request: Request, tenant: Tenant, adapter: Adapter) -> Response:
        """Move the adapter to another backbone: its kept inputs are embedded again, and fitted."""
        wanted = await bodies.model(request, requests.RebaseRequest)
        return render.revised(await editor.rebase(tenant, adapter, wanted.backbone, wanted.promote))
