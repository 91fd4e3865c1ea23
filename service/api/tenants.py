"""The routes for tenants, their quotas and their keys."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from fastapi import FastAPI, Request, Response

from adapters.adaptation.erasure import Eraser
from adapters.registry.tenants import KeyRecord, Quotas, TenantRecord, Tenants
from service.api.dependencies import Behind, Limit
from service.api.openapi import body, problems
from service.edge.access import needs
from service.edge.auth import NamedTenant
from service.payloads import render
from service.payloads.reader import RequestReader
from service.payloads.responses import ErasureOut
from service.payloads.tenants import (
    KeyOut,
    KeyRequest,
    KeysOut,
    NewKeyOut,
    QuotasIn,
    RotateRequest,
    TenantOut,
    TenantRequest,
    TenantsOut,
)


def add_tenants(api: FastAPI, tenants: Tenants, eraser: Eraser, bodies: RequestReader) -> None:
    """Add the routes for tenants, quotas and keys."""

    @api.post(
        "/tenants",
        openapi_extra=body(TenantRequest),
        responses={201: {"model": TenantOut}, **problems(403, 409, 415, 422)},
        status_code=201,
    )
    @needs("operator")
    async def create_tenant(request: Request) -> Response:
        """Make a tenant."""
        wanted = await bodies.model(request, TenantRequest)
        return render.answer(_tenant(await asyncio.to_thread(tenants.create, wanted.tenant)), status=201)

    @api.get("/tenants", responses={200: {"model": TenantsOut}, **problems(403)})
    @needs("operator")
    async def list_tenants(cursor: Behind, limit: Limit = 100) -> Response:
        """The tenants in the order of their names."""
        found = await asyncio.to_thread(tenants.tenants, cursor, limit + 1)
        following = render.cursor(found[limit - 1].name) if len(found) > limit else None
        return render.answer({"tenants": [_tenant(one) for one in found[:limit]], "next": following})

    @api.get("/tenants/{tenant}", responses={200: {"model": TenantOut}, **problems(404)})
    @needs("admin")
    async def tenant(tenant: NamedTenant) -> Response:
        """One tenant."""
        return render.answer(_tenant(await asyncio.to_thread(tenants.tenant, tenant)))

    @api.delete(
        "/tenants/{tenant}",
        responses={200: {"model": ErasureOut}, **problems(403, 404)},
    )
    @needs("operator")
    async def erase_tenant(tenant: NamedTenant) -> Response:
        """Erase a tenant with all that it has: adapters, examples, versions, jobs, keys, quotas.

        What is being done for it is broken off. All of it is gone within 5 seconds, in every process.
        """
        return render.erased(await eraser.tenant(tenant))

    @api.put(
        "/tenants/{tenant}/quotas",
        openapi_extra=body(QuotasIn),
        responses={200: {"model": TenantOut}, **problems(403, 404, 415, 422)},
    )
    @needs("operator")
    async def set_quotas(request: Request, tenant: NamedTenant) -> Response:
        """Say what a tenant may have: all of it at once. Every process heeds it within 5 seconds."""
        wanted = await bodies.model(request, QuotasIn)
        quotas = Quotas(**wanted.model_dump())
        return render.answer(_tenant(await asyncio.to_thread(tenants.set_quotas, tenant, quotas)))

    @api.get("/tenants/{tenant}/keys", responses={200: {"model": KeysOut}, **problems(404)})
    @needs("admin")
    async def keys(tenant: NamedTenant) -> Response:
        """The tenant's keys, without their secrets."""
        found = await asyncio.to_thread(tenants.keys, tenant)
        return render.answer({"keys": [_key(one) for one in found]})

    @api.post(
        "/tenants/{tenant}/keys",
        openapi_extra=body(KeyRequest),
        responses={201: {"model": NewKeyOut}, **problems(404, 409, 415, 422)},
        status_code=201,
    )
    @needs("admin")
    async def create_key(request: Request, tenant: NamedTenant) -> Response:
        """Make a key. The answer holds the whole of it, once."""
        wanted = await bodies.model(request, KeyRequest)
        lifetime = None if wanted.expires_in is None else timedelta(seconds=wanted.expires_in)
        return _new_key(
            *await asyncio.to_thread(
                tenants.create_key, tenant, wanted.scopes, note=wanted.note, lifetime=lifetime
            )
        )

    @api.post(
        "/tenants/{tenant}/keys/{key}/rotate",
        openapi_extra=body(RotateRequest),
        responses={201: {"model": NewKeyOut}, **problems(404, 409, 415, 422)},
        status_code=201,
    )
    @needs("admin")
    async def rotate_key(request: Request, tenant: NamedTenant, key: str) -> Response:
        """Make a key in the place of another, which goes on for a while."""
        wanted = await bodies.model(request, RotateRequest)
        grace = timedelta(seconds=wanted.grace)
        return _new_key(*await asyncio.to_thread(tenants.rotate, tenant, key, grace))

    @api.delete("/tenants/{tenant}/keys/{key}", responses={200: {"model": KeyOut}, **problems(404)})
    @needs("admin")
    async def revoke_key(tenant: NamedTenant, key: str) -> Response:
        """Revoke a key: within 5 seconds it opens nothing any more, in every process."""
        return render.answer(_key(await asyncio.to_thread(tenants.revoke, tenant, key)))


def _tenant(record: TenantRecord) -> dict[str, Any]:
    return {
        "tenant": record.name,
        "created_at": record.created_at,
        "quotas": asdict(record.quotas),
        "adapters": record.adapters,
        "examples": record.examples,
        "keys": record.keys,
    }


def _key(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "tenant": record.tenant,
        "scopes": record.scopes,
        "note": record.note,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
    }


def _new_key(record: KeyRecord, key: str) -> Response:
    headers = {"Cache-Control": "no-store"}
    return render.answer({**_key(record), "key": key}, headers, status=201)
