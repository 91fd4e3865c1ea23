"""The service's own edge around a few routes, called in process:

For what the edge promises about any routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import httpx
from fastapi import FastAPI, Request
from pydantic import BaseModel

from adapters.registry.tenants import HeldKey
from service import errors
from service.api.docs import add_docs
from service.edge.access import needs
from service.edge.auth import Authenticator, Tenant
from service.edge.gateway import Edge
from service.monitoring.metrics import Metrics
from service.settings import Settings


class Body(BaseModel):
    """Something to validate."""

    items: list[int]


async def nobody(key_id: str) -> HeldKey | None:
    """No tenant has a key."""
    return None


class Shell:
    """Edge, metrics and a client whose requests go straight to the edge."""

    def __init__(
        self,
        settings: Settings,
        addresses: Iterable[str] = ("127.0.0.1",),
        find: Callable[[str], Awaitable[HeldKey | None]] = nobody,
    ) -> None:
        self.metrics = Metrics()
        self.edge = Edge()
        self.app = _app()
        self.cancelled = asyncio.Event()
        self.app.state.shell = self
        guard = Authenticator(settings.admin_key, addresses, find)
        routes = self.app.router.routes
        self.edge.open(self.app, routes, settings=settings, guard=guard, observe=self.metrics.request)

    def client(self, **headers: str) -> httpx.AsyncClient:
        """A client of the edge, with headers for every request."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.edge), base_url="http://127.0.0.1:3000", headers=headers
        )


def _app() -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, title="Shell")
    errors.install(app)
    add_docs(app)

    @app.get("/things/{name}")
    @needs("key")
    async def thing(name: str) -> dict[str, str]:
        return {"name": name}

    @app.get("/tenant")
    @needs("key")
    async def tenant(tenant: Tenant) -> dict[str, str]:
        return {"tenant": tenant}

    @app.post("/validated")
    @needs("adapt")
    async def validated(body: Body) -> dict[str, int]:
        return {"items": len(body.items)}

    @app.post("/asked")
    @needs("predict")
    async def asked() -> None:
        """What is asked changes nothing."""

    @app.post("/streamed")
    @needs("key")
    async def streamed(request: Request) -> dict[str, int]:
        return {"bytes": sum([len(chunk) async for chunk in request.stream()])}

    @app.post("/failing")
    @needs("key")
    async def failing() -> None:
        raise ZeroDivisionError("a secret of the inside")

    @app.post("/slow")
    @needs("adapt")
    async def slow(request: Request) -> None:
        await request.body()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            request.app.state.shell.cancelled.set()
            raise

    return app
