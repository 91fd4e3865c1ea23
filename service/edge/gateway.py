"""The ASGI application around the routes: its layers, and whether it is open."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from service.edge.audit import Audit
from service.edge.deadlines import Deadlines, RunningRequests
from service.edge.layers import (
    Authentication,
    Channels,
    ErrorAnswers,
    HeaderChecks,
    Layer,
    Observer,
    Records,
    RequestChecks,
    TenantShares,
    layered,
)
from service.edge.pace import Pace
from service.edge.routes import Contract, RouteTable
from service.errors import Problem, is_openai, respond
from service.server.scope import new_id

if TYPE_CHECKING:
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Receive, Scope, Send

    from service.edge.auth import Authenticator
    from service.settings import Settings


class Edge:
    """ASGI application around the routes. It is mounted before they exist and answers 503 until `open`."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None
        self._running: RunningRequests | None = None
        self._guard: Authenticator | None = None
        self._audit = Audit()

    def open(
        self,
        app: ASGIApp,
        routes: Sequence[BaseRoute],
        *,
        settings: Settings,
        guard: Authenticator,
        observe: Observer,
    ) -> None:
        """Let requests through to the declared ones of the application's own `routes`."""
        table = RouteTable(routes)
        self._guard = guard
        self._running = RunningRequests(guard, settings.request_timeout)
        layers: list[Layer] = [
            partial(Channels, table=table, settings=settings),
            partial(Records, observe=observe, access_log=settings.access_log, audit=self._audit),
            HeaderChecks,
            partial(Authentication, guard=guard),
            RequestChecks,
            partial(TenantShares, pace=Pace()),
            ErrorAnswers,
            partial(Deadlines, running=self._running),
            partial(Contract, table=table),
        ]
        self._app = layered(app, layers)

    def close(self) -> None:
        """Answer 503 from now on; write the pending lines of the audit log."""
        self._app = None
        self._audit.write()

    def end(self, tenant: str, why: Exception) -> None:
        """Cancel the tenant's requests and answer them with `why`; requests that manage tenants go on."""
        if self._running is not None:
            self._running.end(tenant, why)

    async def watch(self) -> None:
        """Cancel requests whose key was revoked or has expired, and share rates, until it is cancelled."""
        if self._running is not None and self._guard is not None:
            await asyncio.gather(self._running.watch_keys(), self._guard.share_rates())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000, "reason": "no websockets here"})
            return
        if self._app is None:
            problem = Problem(
                503,
                "not_ready",
                "The service is starting or stopping. Try again later.",
                headers={"Retry-After": "1"},
            )
            await respond(problem, new_id(), openai=is_openai(scope["path"]))(scope, receive, send)
            return
        await self._app(scope, receive, send)
