"""Who may call: with the admin key, with a tenant's, or from this machine. And which tenant a call is for."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, get_args

from fastapi import Depends, Request
from pydantic import SecretStr

from adapters.registry.records import RegistryUnavailable, UnknownTenant
from adapters.registry.tenants import HeldKey, Scope, split_key
from adapters.storage.artifact import is_tenant
from service.edge.access import Access
from service.edge.rate_limits import Meter, RateLimiter
from service.errors import Problem

# What a browser on this machine calls the service. Names that only resolve to it are not among them.
_LOCAL_HOST = re.compile(r"(localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
_OWN_PAGES = (None, b"same-origin", b"none")

Headers = Mapping[bytes, bytes]
"""As in ASGI: lower-case names, the last of each."""

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
# Who was refused before it was known whose key it is.
STRANGER = Caller(None, frozenset(), "unknown")


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a request may pass."""

    caller: Caller  # as far as it is known
    refusal: Exception | None = None


async def _no_keys(key_id: str) -> HeldKey | None:
    """There are no tenants' keys."""
    return None


class Authenticator:
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
        self._meters = RateLimiter()

    async def admit(self, access: Access, method: str, headers: Headers) -> Admission:
        """Who the request is from, and its refusal. access: what its route needs."""
        if self._key is None:
            return Admission(LOCAL, _foreign_host(headers) or _foreign_page(access, method, headers))
        if access.need == "nothing":
            return Admission(NOBODY)
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip()
        if scheme.lower() != b"bearer":
            return Admission(STRANGER, _unauthorized())
        if secrets.compare_digest(given, self._key):
            return Admission(OPERATOR)
        try:
            key = await self._key_of(given)
        except Exception as error:
            return Admission(STRANGER, error)
        return Admission(STRANGER, _unauthorized()) if key is None else self._as_tenant(key, access, headers)

    async def check(self, caller: Caller) -> Problem | None:
        """The refusal of one who was let in, and would not be by now."""
        if caller.tenant is None:
            return None
        with suppress(RegistryUnavailable):
            if await self._find(caller.key) is None:
                return _unauthorized()
        return None

    async def _key_of(self, given: bytes) -> HeldKey | None:
        """The tenant's key that was sent. Raises RegistryUnavailable for one that was not read before."""
        parts = split_key(given.decode("latin-1"))
        key = await self._find(parts[0]) if parts else None
        return key if parts is not None and key is not None and key.opens_with(parts[1]) else None

    def _as_tenant(self, key: HeldKey, access: Access, headers: Headers) -> Admission:
        caller = Caller(key.tenant, key.scopes, key.id)
        named = headers.get(b"x-tenant")
        if named is not None and named.decode("latin-1") != key.tenant:
            detail = "The key is another tenant's than X-Tenant names; leave it out."
            return Admission(caller, Problem(403, "wrong_tenant", detail))
        refusal = _missing(access, key)
        if refusal is not None:
            return Admission(caller, refusal)
        meter = self._meters.admit(key.tenant, key.quotas)
        if isinstance(meter, Problem):
            return Admission(caller, meter)
        return Admission(replace(caller, meter=meter))


def _missing(access: Access, key: HeldKey) -> Problem | None:
    """The refusal of a tenant's key that does not open what the route needs."""
    if access.need == "operator":
        return Problem(403, "operator_only", "This needs the admin key of the service.")
    if access.need in ("nothing", "key") or access.need in key.scopes:
        return None
    detail = f"This needs a key with the scope {access.need!r}; ask the operator for one."
    return Problem(403, "scope_missing", detail)


def _unauthorized() -> Problem:
    return Problem(
        401,
        "unauthorized",
        "Send the key as `Authorization: Bearer <key>`.",
        headers={"WWW-Authenticate": 'Bearer realm="topwork"'},
    )


def _foreign_host(headers: Headers) -> Problem | None:
    host = headers.get(b"host", b"").decode("latin-1")
    if is_local_host(host):
        return None
    return Problem(
        403,
        "host_refused",
        "Without a key the service answers to localhost only. Set TOPWORK_ADMIN_KEY for other names.",
    )


def _foreign_page(access: Access, method: str, headers: Headers) -> Problem | None:
    """The refusal of what a browser sends for a page of another origin, another local port's included.

    A link that leads to an open document is followed: no page can read what another window shows.
    """
    origin = headers.get(b"origin")
    own = origin is None or _without_port_80(origin) == b"http://" + _without_port_80(headers[b"host"])
    if own and headers.get(b"sec-fetch-site") in _OWN_PAGES:
        return None
    follows_link = (
        headers.get(b"sec-fetch-mode") == b"navigate" and headers.get(b"sec-fetch-dest") == b"document"
    )
    if origin is None and follows_link and access.need == "nothing" and method == "GET":
        return None
    return Problem(
        403,
        "origin_refused",
        "Without a key the service answers no other site's pages. Set TOPWORK_ADMIN_KEY to allow that.",
    )


def _without_port_80(name: bytes) -> bytes:
    return name.lower().removesuffix(b":80")


@lru_cache(256)
def is_local_host(host: str) -> bool:
    """Whether a Host header names this machine: localhost, 127.0.0.0/8 or [::1], with or without a port."""
    found = _LOCAL_HOST.fullmatch(host)
    return found is not None and is_loopback(found[1].strip("[]").lower())


def caller_of(request: Request) -> Caller:
    """Who the edge found the request to be from."""
    caller: Caller = request.scope["state"]["caller"]
    return caller


def count_items(request: Request, count: int) -> None:
    """Counts what the request asks for against its caller's quotas."""
    caller_of(request).use("items", count)
    request.scope["state"]["items"] = count


def in_vain(request: Request) -> None:
    """Notes that the request has no good item: it counts as refused, whatever its status."""
    request.scope["state"]["in_vain"] = True


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


Tenant = Annotated[str, Depends(tenant_of)]
NamedTenant = Annotated[str, Depends(named_tenant)]
