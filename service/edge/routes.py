"""Routes that declare who may call them, the table that finds a request's route, and the rules of all routes.

A route that declares nothing is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import signature
from typing import Any, Literal, get_args

from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query
from fastapi.routing import APIRoute
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, request_response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.payloads.validation import refuse_parameters

Need = Literal["nothing", "key", "predict", "adapt", "admin", "operator"]
"""Least to most: no key, any key, a key with that scope (predict, adapt, admin), the service's admin key."""

BodyKind = Literal["none", "small", "inputs", "upload"]
"""No body, a small JSON object, inputs or examples in any form, or the latter and bulk uploads as well.

It sets how many bytes are read (see Channels in layers.py), and that only bulk uploads are not paced.
"""

_NEEDS: tuple[Need, ...] = get_args(Need)
_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})

# Matching a path against the routes takes 5 to 100 µs, so recent results are cached.
_REMEMBERED = 1_024  # results in the LRU cache
_USUAL_PATH = 128  # characters; only shorter paths are cached
# Callers send many inputs with the same query string, so parsed ones are cached.
_SHORT_QUERY = 256  # bytes; longer query strings are not cached


@dataclass(frozen=True, slots=True)
class Body:
    """The body that a route takes."""

    kind: BodyKind
    documented: dict[str, Any] = field(default_factory=dict)  # the route's `openapi_extra`


NO_BODY = Body("none")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a route may answer.

    FastAPI is told the names of the types only, for it would prepare to validate with them, which takes a
    second of the start. Their schemas are made when the OpenAPI document is asked for.
    """

    responses: dict[int | str, dict[str, Any]] = field(default_factory=dict)  # as FastAPI's, by status
    models: tuple[type, ...] = ()  # the types to which the responses refer

    def __or__(self, other: Answers) -> Answers:
        return Answers(self.responses | other.responses, self.models + other.models)


@dataclass(frozen=True, slots=True)
class Access:
    """What the edge must know about a route before it calls it."""

    need: Need
    body: BodyKind = "none"

    @property
    def is_about_tenants(self) -> bool:
        """Whether the route manages tenants or keys; erasing a tenant does not abort its requests."""
        return self.need in ("admin", "operator")

    def may_change(self, method: str) -> bool:
        """Whether a request with this method may change data; predictions never do."""
        return method in _WRITES and self.need != "predict"


# An unknown path needs a key, so that only callers with a key learn that it does not exist.
NO_ROUTE = Access("key")


class DeclaredRoute(APIRoute):
    """A route of the API that declares which key may call it, what body it takes and what it may answer.

    `documented`: for the OpenAPI document, as FastAPI's own routes take it. `parameters` are the names of the
    query parameters in that document.
    """

    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Callable[..., Any],
        need: Need,
        answers: Answers | None = None,
        *,
        body: Body = NO_BODY,
        **documented: Any,
    ) -> None:
        self.answers = answers or Answers()
        super().__init__(
            path,
            endpoint,
            methods=[method],
            operation_id=endpoint.__name__,  # generated clients name their methods after it
            responses=self.answers.responses,
            openapi_extra=body.documented or None,
            **documented,
        )
        if _is_plain(endpoint):
            # FastAPI has nothing to do for it, and takes a tenth of a millisecond.
            self.app = request_response(endpoint)
        self.access = Access(need, body.kind)
        listed = body.documented.get("parameters", ())
        self.parameters = frozenset(one["name"] for one in listed if one["in"] == "query").union(
            field.alias for field in get_flat_params(self.dependant) if isinstance(field.field_info, Query)
        )


def _is_plain(endpoint: Callable[..., Any]) -> bool:
    """Whether an endpoint takes the request alone and returns a response."""
    found = signature(endpoint, eval_str=True)
    takes = [one.annotation for one in found.parameters.values()]
    returns = found.return_annotation
    return takes == [Request] and isinstance(returns, type) and issubclass(returns, Response)


class RouteTable:
    """The declared routes of an application, matched in the order in which its router tries them."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        """`routes`: all routes of the application; those that declare nothing are left out, so closed.

        Results are cached, so no route may be added later.
        """
        self._routes = [route for route in routes if isinstance(route, DeclaredRoute)]
        self._remembered = lru_cache(_REMEMBERED)(self._find)

    def find(self, scope: Scope) -> tuple[DeclaredRoute | None, Access]:
        """Return the route that answers the request, or None, and its access rule.

        HEAD is looked up as GET. A path that exists without this method gets the strictest rule of its
        routes, so that no access is opened if the method is interpreted differently later.
        """
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        find = self._remembered if len(scope["path"]) < _USUAL_PATH else self._find
        return find(method, scope["path"], scope.get("root_path", ""))

    def allowed(self, path: str) -> list[str]:
        """Return the methods of a path, sorted, with OPTIONS and, if there is GET, HEAD; none if unknown."""
        found = [route.methods or () for route in self._routes if route.path_regex.match(path)]
        if not found:
            return []
        methods = {"OPTIONS"}.union(*found)
        return sorted(methods | ({"HEAD"} if "GET" in methods else set()))

    def _find(self, method: str, path: str, root_path: str) -> tuple[DeclaredRoute | None, Access]:
        scope = {"type": "http", "method": method, "path": path, "root_path": root_path}
        others: list[Access] = []
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return route, route.access
            if match is Match.PARTIAL:
                others.append(route.access)
        return None, max((NO_ROUTE, *others), key=lambda access: _NEEDS.index(access.need))


class Contract:
    """ASGI middleware that applies the rules of the routes. Another layer has put the route into the scope.

    HEAD gets the status and headers of GET. OPTIONS, and a method that a path does not have, are answered
    with `Allow`. A query parameter that the route does not have is refused by name.
    """

    def __init__(self, app: ASGIApp, table: RouteTable) -> None:
        self._app = app
        self._table = table

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route: DeclaredRoute | None = scope.get("route")
        if route is not None:
            if scope["query_string"]:
                refuse_parameters(_names(scope["query_string"]), route.parameters)
            await (self._head if scope["method"] == "HEAD" else self._app)(scope, receive, send)
            return
        methods = self._table.allowed(scope["path"])
        if not methods:
            # The application is not asked: it would also answer routes that declare nothing.
            raise HTTPException(404)
        headers = {"Allow": ", ".join(methods)}
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


def _names(query: bytes) -> frozenset[str]:
    return (_parsed if len(query) <= _SHORT_QUERY else _parsed.__wrapped__)(query)


@lru_cache(1024)
def _parsed(query: bytes) -> frozenset[str]:
    return frozenset(QueryParams(query))
