"""The endpoints of tenants, their quotas and their keys."""

from __future__ import annotations

from datetime import timedelta

from fastapi import Request, Response

from adapters.adaptation.erasure import Eraser
from adapters.registry.tenants import Tenants
from adapters.threads import DATABASE
from service.api.dependencies import NamedTenant, Page
from service.edge.key_cache import KeyCache
from service.payloads.reader import RequestReader
from service.payloads.responses.adaptation import render_erased
from service.payloads.responses.tenants import (
    render_key,
    render_keys,
    render_new_key,
    render_tenant,
    render_tenants,
)
from service.payloads.tenants import KeyRequest, QuotasIn, RotateRequest, TenantRequest


class TenantEndpoints:
    """What the operator does with tenants, and a tenant's administrator with its keys."""

    def __init__(self, tenants: Tenants, eraser: Eraser, keyring: KeyCache, reader: RequestReader) -> None:
        self._tenants = tenants
        self._eraser = eraser
        self._keyring = keyring
        self._reader = reader

    async def create_tenant(self, request: Request) -> Response:
        """Create a tenant."""
        wanted = await self._reader.model(request, TenantRequest)
        return render_tenant(await DATABASE.run(self._tenants.create, wanted.tenant), status=201)

    async def list_tenants(self, page: Page) -> Response:
        """List the tenants in the order of their names."""
        found = await DATABASE.run(self._tenants.tenants, page.after, page.wanted)
        return render_tenants(found, page)

    async def get_tenant(self, tenant: NamedTenant) -> Response:
        """Return one tenant."""
        return render_tenant(await DATABASE.run(self._tenants.tenant, tenant))

    async def erase_tenant(self, tenant: NamedTenant) -> Response:
        """Erase a tenant with all that it has: adapters, examples, versions, jobs, keys and quotas.

        Its running work is aborted. All of it is gone within 5 seconds, in every process.
        """
        return render_erased(await self._eraser.tenant(tenant))

    async def set_quotas(self, request: Request, tenant: NamedTenant) -> Response:
        """Set the quotas of a tenant, all at once. Every process applies them within 5 seconds."""
        wanted = await self._reader.model(request, QuotasIn)
        changed = await DATABASE.run(self._tenants.set_quotas, tenant, wanted.quotas())
        self._keyring.drop_of(tenant)
        return render_tenant(changed)

    async def list_keys(self, tenant: NamedTenant) -> Response:
        """List the keys of the tenant, without their secrets."""
        found = await DATABASE.run(self._tenants.keys, tenant)
        return render_keys(found)

    async def create_key(self, request: Request, tenant: NamedTenant) -> Response:
        """Create a key. The answer holds the whole key, this once."""
        wanted = await self._reader.model(request, KeyRequest)
        lifetime = None if wanted.expires_in is None else timedelta(seconds=wanted.expires_in)
        return render_new_key(
            *await DATABASE.run(
                self._tenants.create_key, tenant, wanted.scopes, note=wanted.note, lifetime=lifetime
            )
        )

    async def rotate_key(self, request: Request, tenant: NamedTenant, key: str) -> Response:
        """Replace a key by a new one. The old key stays valid for a while."""
        wanted = await self._reader.model(request, RotateRequest)
        grace = timedelta(seconds=wanted.grace)
        rotated = await DATABASE.run(self._tenants.rotate, tenant, key, grace)
        self._keyring.drop_of(tenant)
        return render_new_key(*rotated)

    async def revoke_key(self, tenant: NamedTenant, key: str) -> Response:
        """Revoke a key. Every process refuses it within 5 seconds."""
        revoked = await DATABASE.run(self._tenants.revoke, tenant, key)
        self._keyring.drop_of(tenant)
        return render_key(revoked)
