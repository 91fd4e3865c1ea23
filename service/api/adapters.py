"""The endpoints of adapters, their versions and their live alias."""

from __future__ import annotations

from fastapi import Request, Response

from adapters.adaptation.catalog import AdapterCatalog
from adapters.adaptation.erasure import Eraser
from adapters.adaptation.rebase import Rebaser
from adapters.adaptation.rollback import Restorer
from adapters.prediction.export import Format, VersionExporter
from service.api.dependencies import Adapter, Expected, Page, Tenant, Version
from service.api.idempotency import IdempotencyGuard, Replying
from service.payloads import requests
from service.payloads.reader import RequestReader
from service.payloads.responses.adaptation import render_erased, render_restored, render_revised
from service.payloads.responses.adapters import (
    render_adapter,
    render_adapters,
    render_version,
    render_versions,
)
from service.payloads.responses.answer import render_file


class AdapterEndpoints:
    """What is done with an adapter as a whole, or with one of its versions."""

    def __init__(
        self,
        catalog: AdapterCatalog,
        rebaser: Rebaser,
        restorer: Restorer,
        exporter: VersionExporter,
        eraser: Eraser,
        reader: RequestReader,
        guard: IdempotencyGuard,
    ) -> None:
        self._catalog = catalog
        self._rebaser = rebaser
        self._restorer = restorer
        self._exporter = exporter
        self._eraser = eraser
        self._reader = reader
        self._guard = guard

    async def adapters(self, tenant: Tenant, page: Page) -> Response:
        """The tenant's adapters in the order of their names."""
        return render_adapters(await self._catalog.adapters(tenant, page.after, page.wanted), page)

    async def adapter(self, tenant: Tenant, adapter: Adapter) -> Response:
        """One adapter. Its entity tag stands for what `live` points to."""
        return render_adapter(await self._catalog.adapter(tenant, adapter))

    async def delete_adapter(self, tenant: Tenant, adapter: Adapter) -> Response:
        """Erase an adapter with its examples, versions and jobs: all of it is gone within 5 seconds."""
        return render_erased(await self._eraser.adapter(tenant, adapter))

    async def versions(self, tenant: Tenant, adapter: Adapter) -> Response:
        """The versions that are kept, with their reports, the newest first."""
        return render_versions(*await self._catalog.versions(tenant, adapter))

    async def version(self, tenant: Tenant, adapter: Adapter, version: Version) -> Response:
        """One version with its report."""
        return render_version(*await self._catalog.version(tenant, adapter, version))

    async def export(
        self, tenant: Tenant, adapter: Adapter, version: Version, format: Format = "onnx"
    ) -> Response:
        """The version as one ONNX file, from prepared inputs to probabilities, or its head as safetensors."""
        content = await self._exporter.export(tenant, adapter, version, format)
        return render_file(content, f"{adapter}-{version}.{format}")

    async def promote(self, request: Request, tenant: Tenant, adapter: Adapter, etag: Expected) -> Response:
        """Promote a version, or roll back to it: then newer ones are withheld until a person lifts that."""
        wanted = await self._reader.model(request, requests.PromoteRequest)
        return render_adapter(await self._catalog.promote(tenant, adapter, wanted.version, etag))

    async def restore(
        self, request: Request, tenant: Tenant, adapter: Adapter, version: Version, etag: Expected
    ) -> Response:
        """Make a version live, and the examples those that it was fitted on; the others are set aside."""

        async def go_back(asked: Request, reply: Replying) -> Response:
            await self._reader.nothing(asked)
            done = await self._restorer.restore(tenant, adapter, version, etag, reply(render_restored))
            return render_restored(done)

        return await self._guard.answer(request, tenant, go_back)

    async def rebase(self, request: Request, tenant: Tenant, adapter: Adapter) -> Response:
        """Move the adapter to another backbone: its kept inputs are embedded again, and fitted."""
        wanted = await self._reader.model(request, requests.RebaseRequest)
        return render_revised(await self._rebaser.rebase(tenant, adapter, wanted.backbone, wanted.promote))
