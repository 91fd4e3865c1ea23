"""Who may call: with the admin key, with a tenant's, or from this machine. And which tenant a call is for."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, get_args
from urllib.parse import urlsplit

from fastapi import Depends, Request
from pydantic import SecretStr

from adapters.records import RegistryUnavailable, UnknownTenant
from adapters.store import is_tenant
from adapters.tenants import HeldKey, Scope, split_key
from service.errors import Problem
from service.meters import Meter, Meters

# Static, the same for everybody, and fetched by tools that cannot send a key: the documentation by browsers,
# the metrics by Prometheus, whose configuration should not hold an admin's key.
OPEN_PATHS = frozenset({"/docs", "/openapi.json", "/metrics"})
OPEN_PREFIX = "/docs/"

NEEDS_KEY = (
    "The service would listen on {address}, where others can reach it. Set TOPWORK_ADMIN_KEY "
    "(e.g. to the output of `openssl rand -hex 32`), or bind 127.0.0.1."
)


class KeyMissing(RuntimeError):
    """The service listens beyond this machine and has no key to ask for."""

    code = "key_missing"


def listening_addresses() -> tuple[str, ...]:
    """The addresses of the sockets on which this process listens, as BentoML or the command line handed
    them over.

    Whoever starts the service, it inherits its socket already listening, so this needs no option to be
    repeated and cannot disagree with the truth.
    """
    found = set()
    for entry in Path("/dev/fd").iterdir():
        try:
            copy = socket.socket(fileno=socket.dup(int(entry.name)))
        except OSError:
            continue
        with copy:
            if copy.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(str(copy.getsockname()[0]))
    return tuple(sorted(found))


def is_loopback(address: str) -> bool:
    """Whether an IP address, or localhost, is reachable from this machine only."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. tenant: whose key it is, None for the operator, who may name any. meter: of its quotas. key:
    its id, or a word for who has none.
    """

    tenant: str | None
    scopes: frozenset[Scope]
    key: str
    meter: Meter | None = None

    def use(self, what: str, amount: float) -> None:
        """Counts items or bytes against the tenant's quotas."""
        if self.meter is not None:
            self.meter.take(what, amount)


OPERATOR = Caller(None, frozenset(get_args(Scope)), "operator")
# Whoever can reach a service that asks for no key.
LOCAL = Caller(None, frozenset(get_args(Scope)), "none")
NOBODY = Caller(None, frozenset(), "none")


async def _no_keys(key_id: str) -> HeldKey | None:
    """There are no tenants' keys."""
    return None


class Guard:
    """Decides whether a request may pass, and as whom.

    With an admin key, everybody needs that or a tenant's. Without one only on loopback addresses: every
    caller is the operator then, but never a web page of somebody else's: its Origin is refused, and a name
    that was made to point at this machine is not its Host.
    """

    def __init__(
        self,
        admin_key: SecretStr | None,
        addresses: Iterable[str],
        find: Callable[[str], Awaitable[HeldKey | None]] = _no_keys,
    ) -> None:
        """find(id) gives a tenant's key while it is in use.

        Raises KeyMissing without an admin key unless every address is loopback; no known address counts as
        foreign.
        """
        foreign = sorted(
            address for address in (list(addresses) or ["an unknown address"]) if not is_loopback(address)
        )
        if admin_key is None and foreign:
            raise KeyMissing(NEEDS_KEY.format(address=foreign[0]))
        self._key = admin_key.get_secret_value().encode() if admin_key else None
        self._find = find
        self._meters = Meters()

    async def admit(self, method: str, path: str, headers: dict[bytes, bytes]) -> Caller | Problem:
        """Who the request is from, or its refusal. `headers` as in ASGI: lower-case names, the last of each.

        Raises RegistryUnavailable for a tenant's key that was not read before.
        """
        if self._key is None:
            return _check_local(headers) or LOCAL
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return NOBODY
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return _unauthorized()
        given = given.strip()
        if secrets.compare_digest(given, self._key):
            return OPERATOR
        return await self._as_tenant(given, method, path, headers)

    async def check(self, caller: Caller) -> Problem | None:
        """The refusal of one who was let in, and would not be by now."""
        if caller.tenant is None:
            return None
        with suppress(RegistryUnavailable):
            if await self._find(caller.key) is None:
                return _unauthorized()
        return None

    async def _as_tenant(
        self, given: bytes, method: str, path: str, headers: dict[bytes, bytes]
    ) -> Caller | Problem:
        parts = split_key(given.decode("latin-1"))
        key = await self._find(parts[0]) if parts else None
        if parts is None or key is None or not key.opens_with(parts[1]):
            return _unauthorized()
        named = headers.get(b"x-tenant")
        if named is not None and named.decode("latin-1") != key.tenant:
            return Problem(
                403, "wrong_tenant", "The key is another tenant's than X-Tenant names; leave it out."
            )
        scope = needed(method, path)
        if scope is not None and scope not in key.scopes:
            return Problem(
                403,
                "scope_missing",
                f"This needs a key with the scope {scope!r}; ask whoever gave you yours.",
            )
        meter = self._meters.admit(key.tenant, key.quotas)
        return meter if isinstance(meter, Problem) else Caller(key.tenant, key.scopes, key.id, meter)


def needed(method: str, path: str) -> Scope | None:
    """The scope that a key needs; None where any will do: to see what there is to ask."""
    first, _, rest = path.removeprefix("/").partition("/")
    if first in ("predict", "embed", "v1"):
        return "predict"
    if first == "tenants":
        return "admin"
    changes = method not in ("GET", "HEAD")
    teaches = first == "adapters" and (changes or "/examples" in rest or rest.endswith("/export"))
    return "adapt" if teaches or first in ("adapt", "jobs") else None


def _unauthorized() -> Problem:
    return Problem(
        401,
        "unauthorized",
        "Send the key as `Authorization: Bearer <key>`.",
        headers={"WWW-Authenticate": 'Bearer realm="topwork"'},
    )


def _check_local(headers: dict[bytes, bytes]) -> Problem | None:
    host = headers.get(b"host", b"").decode("latin-1")
    origin = headers.get(b"origin")
    if not _is_local("//" + host):
        return Problem(
            403,
            "host_refused",
            "Without a key the service answers to localhost only. Set TOPWORK_ADMIN_KEY for other names.",
        )
    if origin is not None and not _is_local(origin.decode("latin-1")):
        return Problem(
            403,
            "origin_refused",
            "Without a key the service answers no other site's pages. Set TOPWORK_ADMIN_KEY to allow that.",
        )
    return None


@lru_cache(256)
def _is_local(url: str) -> bool:
    return is_loopback(_host_name(url))


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def caller_of(request: Request) -> Caller:
    """Who the edge found the request to be from."""
    caller: Caller = request.scope["state"]["caller"]
    return caller


async def tenant_of(request: Request) -> str:
    """The tenant of the key; of the operator the one named by the X-Tenant header, "default" without one.

    Raises a 422 Problem for an impossible name. Async, or FastAPI would run it in a thread.
    """
    own = caller_of(request).tenant
    if own is not None:
        return own
    name = request.headers.get("x-tenant", "default")
    if not is_tenant(name):
        raise Problem(
            422,
            "invalid_tenant",
            "X-Tenant is 1 to 63 of a-z, 0-9, dot, underscore and dash, the first a letter or digit.",
        )
    return name


async def named_tenant(request: Request, tenant: str) -> str:
    """The tenant in the path. To another tenant's key it is one that does not exist.

    Raises UnknownTenant.
    """
    own = caller_of(request).tenant
    if not is_tenant(tenant) or own not in (None, tenant):
        raise UnknownTenant(tenant[:63])
    return tenant


async def only_operator(request: Request) -> None:
    """Raises a 403 Problem for a tenant's key."""
    caller = caller_of(request)
    if caller.tenant is not None or "admin" not in caller.scopes:
        raise Problem(403, "operator_only", "This needs the admin key of the service.")


Tenant = Annotated[str, Depends(tenant_of)]
NamedTenant = Annotated[str, Depends(named_tenant)]
