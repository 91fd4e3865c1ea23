"""The service's own edge around a few routes, called in process:

For what the edge promises about any routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import httpx
from fastapi import Request
from pydantic import BaseModel

from adapters.registry.tenants import HeldKey
from service.api.app import application
from service.api.dependencies import Tenant
from service.api.operations import PageEndpoints
from service.api.routes import get, page_routes, post
from service.edge.auth import Authenticator
from service.edge.gateway import Edge
from service.edge.routes import Body as Declared
from service.edge.routes import DeclaredRoute
from service.monitoring.metrics import Metrics
from service.settings import Settings


class Body(BaseModel):
    """Something to validate."""

    items: list[int]


async def no_key(key_id: str) -> HeldKey | None:
    """No tenant has a key."""
    return None


class Shell:
    """Edge, metrics and a client whose requests go straight to the edge."""

    def __init__(
        self,
        settings: Settings,
        addresses: Iterable[str] = ("127.0.0.1",),
        find: Callable[[str], Awaitable[HeldKey | None]] = no_key,
        routes: Iterable[DeclaredRoute] = (),
    ) -> None:
        """`routes`: in addition to those of every shell."""
        self.settings = settings
        self.metrics = Metrics()
        self.edge = Edge()
        self.app = application([*ROUTES, *routes])
        self.cancelled = asyncio.Event()
        self.app.state.shell = self
        guard = Authenticator(settings.admin_key, addresses, find)
        self.edge.open(
            self.app, self.app.routes, settings=settings, guard=guard, observe=self.metrics.request
        )

    def client(self, **headers: str) -> httpx.AsyncClient:
        """A client of the edge, with headers for every request."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.edge), base_url="http://127.0.0.1:3000", headers=headers
        )


async def thing(name: str) -> dict[str, str]:
    return {"name": name}


async def whose(tenant: Tenant) -> dict[str, str]:
    return {"tenant": tenant}


async def validated(body: Body) -> dict[str, int]:
    return {"items": len(body.items)}


async def asked() -> None:
    """A route that changes nothing."""


async def streamed(request: Request) -> dict[str, int]:
    return {"bytes": sum([len(chunk) async for chunk in request.stream()])}


async def failing() -> None:
    raise ZeroDivisionError("a secret of the inside")


async def slow(request: Request) -> None:
    await request.body()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        request.app.state.shell.cancelled.set()
        raise


INPUTS = Declared("inputs")
ROUTES = [
    *page_routes(PageEndpoints()),
    get("/things/{name}", thing, "key"),
    get("/tenant", whose, "key"),
    post("/validated", validated, "adapt", body=INPUTS),
    post("/asked", asked, "predict", body=INPUTS),
    post("/streamed", streamed, "key", body=INPUTS),
    post("/failing", failing, "key", body=INPUTS),
    post("/slow", slow, "adapt", body=INPUTS),
]
