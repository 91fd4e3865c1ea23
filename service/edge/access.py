"""Access rules: declared on each endpoint and looked up with the application's own routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

Need = Literal["nothing", "key", "predict", "adapt", "admin", "operator"]
"""Least to most: no key, any key, a key with that scope (predict, adapt, admin), the service's admin key."""

_NEEDS: tuple[Need, ...] = get_args(Need)

# Matching a path against the routes takes 5 to 100 µs, so recent results are cached.
_REMEMBERED = 1_024  # results in the LRU cache
_USUAL_PATH = 128  # characters; only shorter paths are cached

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Access:
    """The access rule of a route."""

    need: Need
    bulk: bool = False  # the body may be a bulk upload
    direct: bool = False  # the endpoint is called without FastAPI

    @property
    def is_about_tenants(self) -> bool:
        """Whether the route manages tenants or keys; erasing a tenant does not abort its requests."""
        return self.need in ("admin", "operator")

    def may_change(self, method: str) -> bool:
        """Whether a request with this method may change data; predictions never do."""
        return method in _WRITES and self.need != "predict"


_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})

# A route without a declaration is closed to tenants' keys.
UNDECLARED = Access("operator")
# An unknown path needs a key, so that only callers with a key learn that it does not exist.
NO_ROUTE = Access("key")


def needs(need: Need, *, bulk: bool = False, direct: bool = False) -> Callable[[Endpoint], Endpoint]:
    """Declare an endpoint's access rule; the decorator goes below the one of the route."""

    def declare(endpoint: Endpoint) -> Endpoint:
        endpoint.access = Access(need, bulk, direct)  # type: ignore[attr-defined]
        return endpoint

    return declare


def access_of(endpoint: Any) -> Access:
    """Return the access rule that the endpoint declares, or UNDECLARED."""
    found = getattr(endpoint, "access", UNDECLARED)
    return found if isinstance(found, Access) else UNDECLARED


class Doors:
    """The routes of an application, matched in the order in which its router tries them."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        """`routes`: all routes of the application; results are cached, so none may be added later."""
        self._routes = routes
        self._remembered = lru_cache(_REMEMBERED)(self._find)

    def find(self, scope: Scope) -> tuple[BaseRoute | None, Access]:
        """Return the route that answers the request, or None, and its access rule.

        HEAD is looked up as GET. A path that exists without this method gets the strictest rule of its
        routes, so that no access is opened if the method is interpreted differently later.
        """
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        find = self._remembered if len(scope["path"]) < _USUAL_PATH else self._find
        return find(method, scope["path"], scope.get("root_path", ""))

    def _find(self, method: str, path: str, root_path: str) -> tuple[BaseRoute | None, Access]:
        scope = {"type": "http", "method": method, "path": path, "root_path": root_path}
        others: list[Access] = []
        for route in self._routes:
            match, child = route.matches(scope)
            if match is Match.FULL:
                return route, access_of(child.get("endpoint"))
            if match is Match.PARTIAL:
                others.append(access_of(child.get("endpoint")))
        return None, max((NO_ROUTE, *others), key=lambda access: _NEEDS.index(access.need))
