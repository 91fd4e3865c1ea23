"""Authentication by admin key, tenant key or loopback address."""

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
from typing import get_args

from pydantic import SecretStr

from adapters.registry.errors import RegistryUnavailable
from adapters.registry.tenants import HeldKey, Scope, split_key
from service.edge.rate_limits import Meter, RateLimiter, Spend
from service.edge.routes import Access
from service.errors import Problem

# The Host headers accepted without an admin key. Other names that resolve to this machine do not match.
_LOCAL_HOST = re.compile(r"(localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
_OWN_PAGES = (None, b"same-origin", b"none")

Headers = Mapping[bytes, bytes]
"""Header values by lower-case name, as in ASGI; of a repeated header, the last value."""

NEEDS_KEY = (
    "The service would listen on {address}, where others can reach it. Set TOPWORK_ADMIN_KEY "
    "(e.g. to the output of `openssl rand -hex 32`), or bind 127.0.0.1."
)


class KeyMissing(RuntimeError):
    """The service would listen on a non-loopback address without an admin key."""

    code = "key_missing"


def listening_addresses() -> tuple[str, ...]:
    """Return the addresses of the listening sockets that BentoML or the command line handed to this process.

    The sockets are inherited in listening state, so they give the actual addresses and no option has to
    repeat them.
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
    """Whether an IP address or "localhost" is reachable from this machine only."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated sender of a request."""

    tenant: str | None  # owner of the tenant's key, else None; the operator may act for any tenant
    scopes: frozenset[Scope]
    key: str  # id of the tenant's key, else a word such as "operator"
    meter: Meter | None = None  # the tenant's quota usage; None without quotas

    def use(self, what: str, amount: float) -> None:
        """Count items or bytes against the tenant's quotas."""
        if self.meter is not None:
            self.meter.take(what, amount)


OPERATOR = Caller(None, frozenset(get_args(Scope)), "operator")
# Every caller of a service without an admin key.
LOCAL = Caller(None, frozenset(get_args(Scope)), "none")
# A caller of a route that needs no key.
NOBODY = Caller(None, frozenset(), "none")
# A caller that was refused before its key was identified.
STRANGER = Caller(None, frozenset(), "unknown")


@dataclass(frozen=True, slots=True)
class Admission:
    """The result of authentication: the request may pass unless it has a refusal."""

    caller: Caller  # STRANGER if the key was not identified
    refusal: Exception | None = None


async def _no_keys(key_id: str) -> HeldKey | None:
    """Find no key: the default without tenants' keys."""
    return None


class Authenticator:
    """Decides whether a request may pass, and who its caller is.

    With an admin key, every caller needs that key or a tenant's. Without one, the service must listen on
    loopback only and every caller is the operator. Pages of other origins are still refused, by their Origin
    header, and so is a foreign Host, against DNS rebinding.
    """

    def __init__(
        self,
        admin_key: SecretStr | None,
        addresses: Iterable[str],
        find: Callable[[str], Awaitable[HeldKey | None]] = _no_keys,
        spend: Spend | None = None,
    ) -> None:
        """`find`: returns the tenant's key with an id, or None if it is not in use. `spend`: see RateLimiter.

        Raises KeyMissing without an admin key unless every address is loopback and there is at least one.
        """
        foreign = sorted(
            address for address in (list(addresses) or ["an unknown address"]) if not is_loopback(address)
        )
        if admin_key is None and foreign:
            raise KeyMissing(NEEDS_KEY.format(address=foreign[0]))
        self._key = admin_key.get_secret_value().encode() if admin_key else None
        self._find = find
        self._meters = RateLimiter(spend)

    async def admit(self, access: Access, method: str, headers: Headers) -> Admission:
        """Authenticate a request and check it against the access rule of its route."""
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
        """Return the refusal of an admitted caller whose key is no longer in use, else None."""
        if caller.tenant is None:
            return None
        with suppress(RegistryUnavailable):
            if await self._find(caller.key) is None:
                return _unauthorized()
        return None

    async def share_rates(self) -> None:
        """Share rates with the other processes, in a loop that runs until it is cancelled."""
        await self._meters.share()

    async def _key_of(self, given: bytes) -> HeldKey | None:
        """Return the tenant's key that was sent, or None.

        Raises RegistryUnavailable if the key is not cached and the database does not answer.
        """
        parts = split_key(given.decode("latin-1"))
        key = await self._find(parts[0]) if parts else None
        return key if parts is not None and key is not None and key.opens_with(parts[1]) else None

    def _as_tenant(self, key: HeldKey, access: Access, headers: Headers) -> Admission:
        caller = Caller(key.tenant, key.scopes, key.id)
        named = headers.get(b"x-tenant")
        if named is not None and named.decode("latin-1") != key.tenant:
            detail = "The key belongs to another tenant than X-Tenant. Leave X-Tenant out."
            return Admission(caller, Problem(403, "wrong_tenant", detail))
        refusal = _missing(access, key)
        if refusal is not None:
            return Admission(caller, refusal)
        meter = self._meters.admit(key.tenant, key.quotas)
        if isinstance(meter, Problem):
            return Admission(caller, meter)
        return Admission(replace(caller, meter=meter))


def _missing(access: Access, key: HeldKey) -> Problem | None:
    """Return the refusal of a tenant's key without the scope that the route needs."""
    if access.need == "operator":
        return Problem(403, "operator_only", "This request needs the admin key of the service.")
    if access.need in ("nothing", "key") or access.need in key.scopes:
        return None
    detail = f"This request needs a key with the scope {access.need!r}. Ask the operator for one."
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
        "Without an admin key the service answers localhost only. Set TOPWORK_ADMIN_KEY to serve "
        "other hosts.",
    )


def _foreign_page(access: Access, method: str, headers: Headers) -> Problem | None:
    """Return the refusal of a browser request from a page of another origin, another local port included.

    Following a link to a public document is allowed: the page with the link cannot read that document.
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
        "Without an admin key the service refuses pages of other sites. Set TOPWORK_ADMIN_KEY to allow them.",
    )


def _without_port_80(name: bytes) -> bytes:
    return name.lower().removesuffix(b":80")


@lru_cache(256)
def is_local_host(host: str) -> bool:
    """Whether a Host header names this machine: localhost, 127.0.0.0/8 or [::1], with or without a port."""
    found = _LOCAL_HOST.fullmatch(host)
    return found is not None and is_loopback(found[1].strip("[]").lower())
