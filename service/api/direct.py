"""The hot paths: endpoints that are called directly, without FastAPI's work around every route."""

from __future__ import annotations

import inspect

from fastapi import FastAPI, Request
from starlette.types import Receive, Scope, Send

from service.edge.routes import DeclaredRoute


class Direct:
    """An ASGI application that calls the endpoints of direct routes, and FastAPI for all others.

    FastAPI knows and documents all routes. Around each endpoint it runs five middlewares, two exit stacks and
    dependency resolution. An endpoint that takes only the request does not need them, and they are a third of
    the event loop's work for a short text. The edge answers the exceptions of direct endpoints.
    """

    def __init__(self, api: FastAPI) -> None:
        """Raises ValueError if the endpoint of a direct route takes anything but the request."""
        self._api = api
        for route in api.routes:
            if not isinstance(route, DeclaredRoute) or not route.access.direct:
                continue
            if list(inspect.signature(route.endpoint).parameters) != ["request"]:
                raise ValueError(f"{route} is direct, and its endpoint does not take the request alone")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope.get("route")
        if route is None or not scope["state"]["access"].direct:
            await self._api(scope, receive, send)
            return
        response = await route.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
