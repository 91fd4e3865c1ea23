"""Rules common to all routes: HEAD wherever there is GET, OPTIONS, no unknown query parameters."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query
from fastapi.routing import APIRoute
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.edge.routes import DeclaredRoute
from service.payloads.validation import refuse_parameters

# Callers send many inputs with the same query string, so parsed ones are cached.
_SHORT_QUERY = 256  # bytes; longer query strings are not cached


@dataclass(frozen=True, slots=True)
class Rule:
    """The path, the methods and the query parameters of one route."""

    path: re.Pattern[str]
    methods: frozenset[str]
    parameters: frozenset[str]


class Contract:
    """ASGI middleware that applies the rules of the routes. The edge must have put the route into the scope.

    HEAD gets the status and headers of GET. OPTIONS, and a method that a path does not have, are answered
    with `Allow`. A query parameter that the route does not have is refused by name.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        # Routes compare by value and are not hashable, so the key is their id.
        self._rules = {id(route): rule_of(route) for route in routes if isinstance(route, DeclaredRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rule = self._rules.get(id(scope.get("route")))
        if rule is not None:
            if scope["query_string"]:
                refuse_parameters(_names(scope["query_string"]), rule.parameters)
            await (self._head if scope["method"] == "HEAD" else self._app)(scope, receive, send)
            return
        others = [one for one in self._rules.values() if one.path.match(scope["path"])]
        if not others:
            # The application is not asked: it would also answer routes that declare nothing.
            raise HTTPException(404)
        headers = {"Allow": ", ".join(allowed(others))}
        if scope["method"] != "OPTIONS":
            raise HTTPException(405, headers=headers)
        await Response(status_code=204, headers=headers)(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as GET up to the end of the headers, then cancel it, even if it would stream for minutes."""
        asked = {**scope, "method": "GET"}
        answered = asyncio.Event()

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})
                answered.set()

        work = asyncio.ensure_future(self._app(asked, receive, send_head))
        end = asyncio.ensure_future(answered.wait())
        try:
            await asyncio.wait((work, end), return_when=asyncio.FIRST_COMPLETED)
            if not answered.is_set():
                await work
        finally:
            scope["route"] = asked.get("route")
            for task in (work, end):
                task.cancel()
            await asyncio.gather(work, end, return_exceptions=True)


def rule_of(route: APIRoute) -> Rule:
    """Return the rule of a route, with the query parameters that its OpenAPI document lists."""
    extra = route.openapi_extra or {}
    parameters = {one["name"] for one in extra.get("parameters", ()) if one["in"] == "query"}
    fields = get_flat_params(route.dependant)
    parameters |= {field.alias for field in fields if isinstance(field.field_info, Query)}
    return Rule(route.path_regex, frozenset(route.methods or ()), frozenset(parameters))


def allowed(rules: Iterable[Rule]) -> list[str]:
    """Return the methods of a path with these rules, sorted, with OPTIONS, and HEAD if there is GET."""
    methods = {"OPTIONS"}.union(*(rule.methods for rule in rules))
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def _names(query: bytes) -> frozenset[str]:
    return (_parsed if len(query) <= _SHORT_QUERY else _parsed.__wrapped__)(query)


@lru_cache(1024)
def _parsed(query: bytes) -> frozenset[str]:
    return frozenset(QueryParams(query))
