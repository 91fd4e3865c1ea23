"""What holds for every route alike: HEAD wherever GET is, OPTIONS, no unknown query parameter."""

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
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.payloads.validation import refuse_parameters

# Callers ask the same of one input after the other.
_SHORT_QUERY = 256


@dataclass(frozen=True, slots=True)
class Rule:
    """Of one route: where it is, its methods, and the names of its query parameters."""

    path: re.Pattern[str]
    methods: frozenset[str]
    parameters: frozenset[str]


class Contract:
    """An ASGI application in front of others, with the rules of their routes. The edge has found the route.

    HEAD is answered as GET would be, up to the end of the headers. OPTIONS, and a method that a path does not
    have, are answered with `Allow`. A query parameter that the route does not have is refused with its name.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        # Routes compare by what they hold, so they have no hash.
        self._rules = {id(route): rule_of(route) for route in routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rule = self._rules.get(id(scope.get("route")))
        if rule is not None:
            if scope["query_string"]:
                refuse_parameters(_names(scope["query_string"]), rule.parameters)
            await (self._head if scope["method"] == "HEAD" else self._app)(scope, receive, send)
            return
        others = [one for one in self._rules.values() if one.path.match(scope["path"])]
        if not others:
            await self._app(scope, receive, send)
            return
        headers = {"Allow": ", ".join(allowed(others))}
        if scope["method"] != "OPTIONS":
            raise HTTPException(405, headers=headers)
        await Response(status_code=204, headers=headers)(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends the answer to GET behind its headers, even one that would go on for minutes."""
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


def rule_of(route: Route | APIRoute) -> Rule:
    """The rule of a route: its query parameters are those that its document has."""
    extra = getattr(route, "openapi_extra", None) or {}
    parameters = {one["name"] for one in extra.get("parameters", ()) if one["in"] == "query"}
    if isinstance(route, APIRoute):
        fields = get_flat_params(route.dependant)
        parameters |= {field.alias for field in fields if isinstance(field.field_info, Query)}
    return Rule(route.path_regex, frozenset(route.methods or ()), frozenset(parameters))


def allowed(rules: Iterable[Rule]) -> list[str]:
    """The methods that a path with these rules has."""
    methods = {"OPTIONS"}.union(*(rule.methods for rule in rules))
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def _names(query: bytes) -> frozenset[str]:
    return (_parsed if len(query) <= _SHORT_QUERY else _parsed.__wrapped__)(query)


@lru_cache(1024)
def _parsed(query: bytes) -> frozenset[str]:
    return frozenset(QueryParams(query))
