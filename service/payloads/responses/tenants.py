"""Responses about tenants and their keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from adapters.registry.quotas import Quotas
from adapters.registry.tenants import KeyRecord, Scope, TenantRecord
from service.payloads.pages import Next, PageQuery
from service.payloads.responses.answer import render

TenantName = Annotated[str, Field(examples=["acme"])]


class TenantOut(TypedDict):
    """A tenant, with what it has."""

    tenant: TenantName
    created_at: datetime
    quotas: Quotas
    adapters: int
    examples: Annotated[int, Field(description="Examples in all adapters together.")]
    keys: Annotated[int, Field(description="Keys in use.")]


class TenantsOut(TypedDict):
    """A page of tenants in the order of their names."""

    tenants: list[TenantOut]
    next: Next


class KeyOut(TypedDict):
    """A key without its secret."""

    id: Annotated[str, Field(examples=["2f7c61d09be34a58"])]
    tenant: TenantName
    scopes: Sequence[Scope]
    note: Annotated[str, Field(examples=["web shop"])]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class NewKeyOut(KeyOut):
    """A new key with its secret."""

    key: Annotated[
        str,
        Field(description="The whole key. It is shown only this once.", examples=["tw_2f7c61d09be34a58_…"]),
    ]


class KeysOut(TypedDict):
    """A tenant's keys, the oldest first; those no longer in use for a month."""

    keys: list[KeyOut]


def render_tenant(record: TenantRecord, status: int = 200) -> Response:
    """Return TenantOut."""
    return render(_describe_tenant(record), status=status)


def render_tenants(records: Sequence[TenantRecord], page: PageQuery) -> Response:
    """Return TenantsOut, a page. `records`: as many as `page.wanted`."""
    shown, following = page.cut(records, lambda last: last.name)
    body: TenantsOut = {"tenants": [_describe_tenant(one) for one in shown], "next": following}
    return render(body)


def render_key(record: KeyRecord) -> Response:
    """Return KeyOut."""
    return render(_describe_key(record))


def render_keys(records: Sequence[KeyRecord]) -> Response:
    """Return KeysOut."""
    body: KeysOut = {"keys": [_describe_key(one) for one in records]}
    return render(body)


def render_new_key(record: KeyRecord, key: str) -> Response:
    """Return NewKeyOut, which no cache may keep."""
    body: NewKeyOut = {**_describe_key(record), "key": key}
    return render(body, {"Cache-Control": "no-store"}, status=201)


def _describe_tenant(record: TenantRecord) -> TenantOut:
    return {
        "tenant": record.name,
        "created_at": record.created_at,
        "quotas": record.quotas,
        "adapters": record.adapters,
        "examples": record.examples,
        "keys": record.keys,
    }


def _describe_key(record: KeyRecord) -> KeyOut:
    return {
        "id": record.id,
        "tenant": record.tenant,
        "scopes": record.scopes,
        "note": record.note,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
    }
