"""Routes that declare who may call them, and the table that finds a request's route.

A route that declares nothing is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

Need = Literal["nothing", "key", "predict", "adapt", "admin", "operator"]
"""Least to most: no key, any key, a key with that scope (predict, adapt, admin), the service's admin key."""

BodyKind = Literal["none", "small", "inputs", "upload"]
"""No body, a small JSON object, inputs or examples in any form, or the latter and bulk uploads as well."""

Responses = dict[int | str, dict[str, Any]]
"""What a route may answer, by status, as FastAPI's `responses`."""

_NEEDS: tuple[Need, ...] = get_args(Need)
_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})

# Matching a path against the routes takes 5 to 100 µs, so recent results are cached.
_REMEMBERED = 1_024  # results in the LRU cache
_USUAL_PATH = 128  # characters; only shorter paths are cached


@dataclass(frozen=True, slots=True)
class Body:
    """The body that a route takes."""

    kind: BodyKind
    documented: dict[str, Any] = field(default_factory=dict)  # the route's `openapi_extra`


NO_BODY = Body("none")


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

    `documented`: for the OpenAPI document, as FastAPI's own routes take it.
    """

    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Callable[..., Any],
        need: Need,
        responses: Responses | None = None,
        *,
        body: Body = NO_BODY,
        **documented: Any,
    ) -> None:
        super().__init__(
            path,
            endpoint,
            methods=[method],
            responses=responses,
            openapi_extra=body.documented or None,
            **documented,
        )
        self.access = Access(need, body.kind)


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
