"""The hot paths: routes that are called straight, without what FastAPI does around every route."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send


class Direct:
    """An ASGI application. Requests for some paths go to their route's endpoint, all others to FastAPI.

    FastAPI knows all of the routes, and documents them. Around an endpoint it has five middlewares, two
    stacks of contexts and the solving of dependencies, which an endpoint that takes the request alone does
    not need: a third of what the event loop does for a short text. What such an endpoint raises, the edge
    answers.
    """

    def __init__(self, api: FastAPI, paths: Iterable[str]) -> None:
        """paths: of routes without parameters in them. Raises ValueError for one that is not so."""
        self._api = api
        self._routes: dict[tuple[str, str], APIRoute] = {}
        found: dict[str, Any] = {getattr(route, "path", ""): route for route in api.routes}
        for path in paths:
            route = found.get(path)
            if not isinstance(route, APIRoute) or list(inspect.signature(route.endpoint).parameters) != [
                "request"
            ]:
                raise ValueError(f"{path} is no route whose endpoint takes the request alone")
            for method in route.methods or ():
                self._routes[method, path] = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self._api(scope, receive, send)
            return
        scope["route"] = route
        response = await route.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
