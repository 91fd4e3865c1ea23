"""What each route asks of its callers: declared on the route, and found by the application's own routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

Need = Literal["nothing", "key", "predict", "adapt", "admin", "operator"]
"""From the least to the most: no key, any key, a key with that scope, the admin key of the service."""

_NEEDS: tuple[Need, ...] = get_args(Need)

# To try the routes takes 5 to 100 µs. What is found of usual paths is remembered, that of the last ones.
_REMEMBERED = 1_024
_USUAL_PATH = 128

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Access:
    """What a route declares of itself."""

    need: Need
    bulk: bool = False  # its body may be a bulk upload
    direct: bool = False  # its endpoint is called without FastAPI

    @property
    def is_about_tenants(self) -> bool:
        """Whether it makes, changes or ends tenants and keys: the end of a tenant does not break it off."""
        return self.need in ("admin", "operator")

    def may_change(self, method: str) -> bool:
        """Whether a request with that method changes something; what is only asked does not."""
        return method in _WRITES and self.need != "predict"


_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})

# A route that declares nothing is closed to tenants' keys.
UNDECLARED = Access("operator")
# A path that no route has. Only a caller with a key is told so.
NO_ROUTE = Access("key")


def needs(need: Need, *, bulk: bool = False, direct: bool = False) -> Callable[[Endpoint], Endpoint]:
    """Declare on an endpoint, below its route, what it needs of a caller."""

    def declare(endpoint: Endpoint) -> Endpoint:
        endpoint.access = Access(need, bulk, direct)  # type: ignore[attr-defined]
        return endpoint

    return declare


def access_of(endpoint: Any) -> Access:
    """What the endpoint declares; UNDECLARED where it does not."""
    found = getattr(endpoint, "access", UNDECLARED)
    return found if isinstance(found, Access) else UNDECLARED


class Doors:
    """The routes of an application, as its router tries them."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        """routes: none is added later."""
        self._routes = routes
        self._remembered = lru_cache(_REMEMBERED)(self._find)

    def find(self, scope: Scope) -> tuple[BaseRoute | None, Access]:
        """The route that answers the request, None where none does, and what it needs.

        HEAD asks for what GET gives. A path that is there without the method needs the most that any of its
        routes needs, so nothing opens if the method is read in another way later.
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
