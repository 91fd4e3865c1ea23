"""What every request passes through around the routes: id, guard, limits, deadline, metrics, log."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adapters.store import is_tenant
from service.accesslog import AccessLog, logged
from service.errors import Problem, is_openai, respond
from service.exchange import Bodies, Exchange, Upload, new_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send

    from adapters.uploads import Form
    from service.auth import Caller, Guard
    from service.metrics import Metrics
    from service.settings import Settings

logger = logging.getLogger("topwork")
audit = logging.getLogger("topwork.audit")

ASKING = frozenset({"/predict", "/embed", "/v1/embeddings"})
"""Paths to which is posted, and that change nothing."""
_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})

BULK: Mapping[str, Form] = {
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "text/csv": "csv",
    "application/zip": "zip",
    "application/x-zip-compressed": "zip",
}
"""The form of a bulk upload by its media type."""

# Of those that are open, adapters/submitting.py receives four; the others wait, and send nothing meanwhile.
UPLOADS = 16
UPLOADS_OF_A_TENANT = 2
# Between looks for keys of requests under way that are in use no more.
_LOOK_SECONDS = 1.0
# Between looks for requests past their deadlines, which end so much late: a share of what each may take, and
# at most. A timer for each request would be set and taken back for nothing.
_LATE_SHARE = 0.1
_LATE_SECONDS = 0.25

# Headers that mean one thing. Of two, one part of what reads the request might heed the first, and another
# the last.
_ONCE = frozenset(
    {
        b"host",
        b"authorization",
        b"x-tenant",
        b"x-request-id",
        b"origin",
        b"content-type",
        b"content-length",
        b"content-encoding",
    }
)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# The operator's, which end no request of their own.
_ABOUT_TENANTS = "/tenants"
_CLIENT_GONE = 499  # nginx's number: nobody is there to read a status


class Slots:
    """What may be open at once, of all tenants and of one. For one event loop."""

    def __init__(self, what: str, most: int, most_of_a_tenant: int) -> None:
        self._what = what
        self._most = most
        self._most_of_a_tenant = most_of_a_tenant
        self._open: Counter[str] = Counter()

    @contextmanager
    def take(self, tenant: str) -> Iterator[None]:
        """Holds one meanwhile. Raises a 429 Problem where there is none left."""
        if self._open[tenant] >= self._most_of_a_tenant or self._open.total() >= self._most:
            raise Problem(
                429,
                f"too_many_{self._what}",
                f"{self._most_of_a_tenant} {self._what} of a tenant may be open at once, and {self._most} "
                "of all; wait for one to end.",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            self._open = +self._open


class Edge:
    """An ASGI application around the routes. Mounted before the routes exist; until `open` it answers 503."""

    def __init__(self) -> None:
        self._inner: _Inner | None = None

    def open(self, app: ASGIApp, *, settings: Settings, guard: Guard, metrics: Metrics) -> None:
        """Lets requests through to the routes."""
        self._inner = _Inner(app, settings, guard, metrics)

    def close(self) -> None:
        """Answers 503 from now on."""
        if self._inner is not None:
            self._inner.log.write()
        self._inner = None

    def end(self, tenant: str, why: Exception) -> None:
        """Breaks off the tenant's requests, with that for an answer; those about it by the operator go on."""
        if self._inner is not None:
            self._inner.end(tenant, why)

    async def watch(self) -> None:
        """Breaks off what goes on under keys that were revoked or have expired, until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                if self._inner is not None:
                    await self._inner.check_keys()
            except Exception:
                # Whoever watches must not be the first to fall.
                logger.exception("keys of requests under way cannot be looked at")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000, "reason": "no websockets here"})
            return
        if self._inner is None:
            problem = Problem(
                503, "not_ready", "The service is starting or stopping.", headers={"Retry-After": "1"}
            )
            await respond(problem, new_id(), openai=is_openai(scope["path"]))(scope, receive, send)
            return
        await self._inner(scope, receive, send)


class _Inner:
    def __init__(self, app: ASGIApp, settings: Settings, guard: Guard, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._guard = guard
        self._metrics = metrics
        self._bodies = Bodies(settings.max_body_bytes, settings.max_bodies_bytes)
        # Uploads go through in parts: their bytes are on the way, and not in memory.
        self._uploads = Bodies(settings.max_upload_bytes, math.inf)
        # Whose they are; the operator's, which are about all tenants, are nobody's.
        self._open: dict[Exchange, tuple[str, Caller] | None] = {}
        self._pause = min(_LATE_SECONDS, _LATE_SHARE * settings.request_timeout)
        self._look: asyncio.TimerHandle | None = None
        self.log = AccessLog()

    def end(self, tenant: str, why: Exception) -> None:
        """See Edge.end."""
        for exchange, whose in list(self._open.items()):
            if whose is not None and whose[0] == tenant:
                exchange.end(why)

    def _end_late(self) -> None:
        """Breaks off what is past its deadline; looks again as long as there is something."""
        now = time.monotonic()
        for exchange in list(self._open):
            if exchange.until <= now:
                detail = exchange.TOO_LONG.format(self._settings.request_timeout)
                exchange.end(Problem(504, "deadline_exceeded", detail))
        self._look = None
        self._look_later()

    def _look_later(self) -> None:
        if self._look is None and self._open:
            self._look = asyncio.get_running_loop().call_later(self._pause, self._end_late)

    async def check_keys(self) -> None:
        """Breaks off what goes on under keys that are in use no more."""
        for exchange, whose in list(self._open.items()):
            refusal = None if whose is None else await self._guard.check(whose[1])
            # It may have been answered meanwhile.
            if refusal is not None and exchange in self._open:
                exchange.end(refusal)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        caller: Caller | None
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id()
        scope.setdefault("state", {})["request_id"] = request_id
        media = headers.get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
        bulk = scope["path"] == "/adapt" and media in BULK
        bodies = self._uploads if bulk else self._bodies
        exchange = (Upload if bulk else Exchange)(scope, receive, send, bodies, request_id)
        try:
            refusal = await self._refusal(scope, headers) or bodies.refuse_declared(headers)
            if refusal is not None:
                await exchange.respond(refusal)(scope, exchange.receive, exchange.send)
            else:
                caller = scope["state"]["caller"]
                about_tenants = scope["path"].startswith(_ABOUT_TENANTS)
                self._open[exchange] = None if about_tenants else (_tenant(caller, headers), caller)
                self._look_later()
                await self._run(scope, exchange)
        finally:
            self._open.pop(exchange, None)
            exchange.close()
            caller = scope["state"].get("caller")
            if caller is not None:
                caller.use("bytes", exchange.bytes)
            seconds = time.perf_counter() - started
            template = getattr(scope.get("route"), "path", None)
            status = exchange.status or _CLIENT_GONE
            self._metrics.request(scope["method"], template, status, seconds)
            if self._settings.access_log:
                self.log.add(scope["method"], scope["path"], status, seconds, request_id)
            if caller is not None and scope["method"] in _WRITES and scope["path"] not in ASKING:
                _record(scope, caller, headers, status, request_id)

    async def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Exception | None:
        """Why the request may not pass; otherwise its scope says who it is from."""
        doubtful = _doubtful(scope, headers)
        if doubtful is not None:
            return doubtful
        try:
            caller = await self._guard.admit(scope["method"], scope["path"], headers)
        except Exception as error:
            return error
        if isinstance(caller, Problem):
            return caller
        scope["state"]["caller"] = caller
        return None

    async def _run(self, scope: Scope, exchange: Exchange) -> None:
        """The routes' answer, or a problem: whatever escapes them, or why they were broken off."""
        try:
            await exchange.answer(self._app, scope, self._settings.request_timeout)
            if exchange.ended is None:
                return
            answer = exchange.refusal(exchange.ended)
        # No name for the error outlives this: its traceback holds this frame, which would hold the error, and
        # only a garbage collection would end that.
        except Exception as error:
            answer = exchange.refusal(error)
        if answer is not None:
            await answer(scope, exchange.receive, exchange.send)


def _doubtful(scope: Scope, headers: Mapping[bytes, bytes]) -> Problem | None:
    """The refusal of a request that can be read in more ways than one (RFC 9112, 3.2)."""
    if b"host" not in headers and scope.get("http_version", "1.1") == "1.1":
        return Problem(400, "bad_request", "The header Host is missing.")
    if len(headers) == len(scope["headers"]):
        return None
    twice = Counter(name for name, _ in scope["headers"] if name in _ONCE)
    if not twice or (found := twice.most_common(1)[0])[1] == 1:
        return None
    return Problem(400, "bad_request", f"The header {found[0].decode('latin-1')} is there more than once.")


def _record(
    scope: Scope, caller: Caller, headers: Mapping[bytes, bytes], status: int, request_id: str
) -> None:
    """One line of the audit log: who changed what, or tried to."""
    tenant = _tenant(caller, headers)
    who = tenant if is_tenant(tenant) else "-"
    path = logged(scope["path"])
    audit.info("%s %s %d tenant=%s key=%s %s", scope["method"], path, status, who, caller.key, request_id)


def _tenant(caller: Caller, headers: Mapping[bytes, bytes]) -> str:
    """Who the request is for, or what its header says."""
    return caller.tenant or headers.get(b"x-tenant", b"default").decode("latin-1")
