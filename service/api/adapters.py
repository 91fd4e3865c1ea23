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

    async def list_adapters(self, tenant: Tenant, page: Page) -> Response:
        """List the adapters of the tenant in the order of their names."""
        return render_adapters(await self._catalog.adapters(tenant, page.after, page.wanted), page)

    async def get_adapter(self, tenant: Tenant, adapter: Adapter) -> Response:
        """Return one adapter. Its entity tag stands for the version that is live."""
        return render_adapter(await self._catalog.adapter(tenant, adapter))

    async def delete_adapter(self, tenant: Tenant, adapter: Adapter) -> Response:
        """Erase an adapter with its examples, versions and jobs. All of it is gone within 5 seconds."""
        return render_erased(await self._eraser.adapter(tenant, adapter))

    async def list_versions(self, tenant: Tenant, adapter: Adapter) -> Response:
        """List the versions that are kept, with their reports, the newest first."""
        return render_versions(*await self._catalog.versions(tenant, adapter))

    async def get_version(self, tenant: Tenant, adapter: Adapter, version: Version) -> Response:
        """Return one version with its report."""
        return render_version(*await self._catalog.version(tenant, adapter, version))

    async def export_version(
        self, tenant: Tenant, adapter: Adapter, version: Version, format: Format = "onnx"
    ) -> Response:
        """Download the version as one ONNX file, or its head as safetensors.

        The ONNX file computes probabilities from prepared inputs.
        """
        content = await self._exporter.export(tenant, adapter, version, format)
        return render_file(content, f"{adapter}-{version}.{format}")

    async def promote_version(
        self, request: Request, tenant: Tenant, adapter: Adapter, etag: Expected
    ) -> Response:
        """Make a version live.

        If it is older than the live one, newer versions are withheld until a person lifts that.
        """
        wanted = await self._reader.model(request, requests.PromoteRequest)
        return render_adapter(await self._catalog.promote(tenant, adapter, wanted.version, etag))

    async def restore_version(
        self, request: Request, tenant: Tenant, adapter: Adapter, version: Version, etag: Expected
    ) -> Response:
        """Make a version live, and the examples those that it was fitted on. The others are set aside."""

        async def go_back(asked: Request, reply: Replying) -> Response:
            await self._reader.nothing(asked)
            done = await self._restorer.restore(tenant, adapter, version, etag, reply(render_restored))
            return render_restored(done)

        return await self._guard.answer(request, tenant, go_back)

    async def rebase_adapter(self, request: Request, tenant: Tenant, adapter: Adapter) -> Response:
        """Move the adapter to another backbone: embed its kept inputs again, and fit a version."""
        wanted = await self._reader.model(request, requests.RebaseRequest)
        return render_revised(await self._rebaser.rebase(tenant, adapter, wanted.backbone, wanted.promote))
