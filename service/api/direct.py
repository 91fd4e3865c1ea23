"""The hot paths: routes that are called straight, without what FastAPI does around every route."""

from __future__ import annotations

import inspect

from fastapi import FastAPI, Request
from starlette.types import Receive, Scope, Send

from service.edge.access import access_of


class Direct:
    """An ASGI application behind the edge. Requests for routes that declare it go to their endpoint, all
    others to FastAPI.

    FastAPI knows all of the routes, and documents them. Around an endpoint it has five middlewares, two
    stacks of contexts and the solving of dependencies, which an endpoint that takes the request alone does
    not need: a third of what the event loop does for a short text. What such an endpoint raises, the edge
    answers.
    """

    def __init__(self, api: FastAPI) -> None:
        """Raises ValueError for a direct route whose endpoint takes more than the request."""
        self._api = api
        for route in api.routes:
            endpoint = getattr(route, "endpoint", None)
            if not access_of(endpoint).direct:
                continue
            if list(inspect.signature(endpoint).parameters) != ["request"]:  # type: ignore[arg-type]
                raise ValueError(f"{route} is direct, and its endpoint does not take the request alone")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope.get("route")
        if route is None or not scope["state"]["access"].direct:
            await self._api(scope, receive, send)
            return
        response = await route.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
