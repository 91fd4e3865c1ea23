"""Who may call: an admin key, or nobody but this machine. And which tenant a call is for."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from pydantic import SecretStr

from service.errors import Problem

TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

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


class Guard:
    """Decides whether a request may pass. Without a key only on loopback addresses, and then never for a
    web page
    of somebody else's: its Origin is refused, and a name that was made to point at this machine is not its
    Host.
    """

    def __init__(self, key: SecretStr | None, addresses: Iterable[str]) -> None:
        """Raises KeyMissing without a key unless every address is loopback;

        No known address counts as foreign.
        """
        foreign = sorted(
            address for address in (list(addresses) or ["an unknown address"]) if not is_loopback(address)
        )
        if key is None and foreign:
            raise KeyMissing(NEEDS_KEY.format(address=foreign[0]))
        self._key = key.get_secret_value().encode() if key else None

    def check(self, path: str, headers: dict[bytes, bytes]) -> Problem | None:
        """None if the request may pass. `headers` as in ASGI: lower-case names, the last of each name."""
        if self._key is None:
            return _check_local(headers)
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and secrets.compare_digest(given.strip(), self._key):
            return None
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


async def tenant_of(request: Request) -> str:
    """The tenant named by the X-Tenant header, "default" without one.

    Raises a 422 Problem for an impossible name. Async, or FastAPI would run it in a thread.
    """
    name = request.headers.get("x-tenant", "default")
    if not TENANT.fullmatch(name):
        raise Problem(
            422,
            "invalid_tenant",
            "X-Tenant is 1 to 63 of a-z, 0-9, dot, underscore and dash, the first a letter or digit.",
        )
    return name


Tenant = Annotated[str, Depends(tenant_of)]
