"""The ASGI application around the routes: request ids, admission, limits, deadlines, metrics and logs."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

from service.edge.access_log import log_request
from service.edge.audit import Audit
from service.edge.auth import STRANGER, Admission
from service.edge.channel import BodyBudget, RequestChannel, UploadChannel
from service.edge.contract import Contract
from service.edge.pace import Pace
from service.edge.routes import Access, RouteTable
from service.errors import Problem, is_openai, respond
from service.server.scope import new_id
from service.server.threads import TENANT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Receive, Scope, Send

    from adapters.examples.upload_forms import Form
    from service.edge.auth import Authenticator, Caller
    from service.settings import Settings

logger = logging.getLogger("topwork")

BULK: Mapping[str, Form] = {
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "text/csv": "csv",
    "application/zip": "zip",
    "application/x-zip-compressed": "zip",
}
"""The form of a bulk upload by its media type."""

# Open bulk uploads; each holds one part (see adapters/jobs/submission.py) in memory, however slow it is.
UPLOADS = 48
UPLOADS_OF_A_TENANT = 2
UPLOAD_PATIENCE = 3.0  # seconds that an upload waits for a slot
_LOOK_SECONDS = 1.0  # between checks that the keys of running requests are still in use
# Deadlines are checked periodically, since a timer for each request costs more and rarely fires. So a request
# may end late, by a share of its timeout and at most by _LATE_SECONDS.
_LATE_SHARE = 0.1
_LATE_SECONDS = 0.25

# Headers that may occur once only: of two values, one component might use the first and another the last.
_ONCE = frozenset(
    {
        b"host",
        b"authorization",
        b"x-tenant",
        b"x-request-id",
        b"origin",
        b"sec-fetch-site",
        b"sec-fetch-mode",
        b"sec-fetch-dest",
        b"content-type",
        b"content-length",
        b"content-encoding",
    }
)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Route patterns also match before a final newline, and no name in a path may contain control characters.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
Observer = Callable[[str, "str | None", int, float], None]
"""Called for each request with its method, its route template (None without a match), status and seconds."""
_CLIENT_GONE = 499  # nginx's status for a caller that hung up; recorded, never sent


class ConcurrencyLimit:
    """Limits what may be open at once, in all and per tenant. For one event loop.

    Once half of all slots are taken, a tenant that has one gets no more.
    """

    def __init__(self, what: str, most: int, most_of_a_tenant: int) -> None:
        self._what = what
        self._most = most
        self._most_of_a_tenant = most_of_a_tenant
        self._open: Counter[str] = Counter()
        self._freed = asyncio.Event()

    @contextmanager
    def take(self, tenant: str) -> Iterator[None]:
        """Hold a slot for the block. Raises a 429 Problem if none is free."""
        if not self._has_room(tenant):
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
            self._freed.set()

    @asynccontextmanager
    async def wait(self, tenant: str, seconds: float) -> AsyncIterator[None]:
        """Wait up to `seconds` for a slot and hold it for the block. Raises a 429 Problem if none is free."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._has_room(tenant):
                    self._freed.clear()
                    await self._freed.wait()
        with self.take(tenant):
            yield

    def _has_room(self, tenant: str) -> bool:
        own, of_all = self._open[tenant], self._open.total()
        share = self._most if own == 0 else self._most / 2
        return own < self._most_of_a_tenant and of_all < share


class Edge:
    """ASGI application around the routes. It is mounted before they exist and answers 503 until `open`."""

    def __init__(self) -> None:
        self._inner: _Inner | None = None

    def open(
        self,
        app: ASGIApp,
        routes: Sequence[BaseRoute],
        *,
        settings: Settings,
        guard: Authenticator,
        observe: Observer,
    ) -> None:
        """Let requests through to the declared ones of the application's own `routes`."""
        self._inner = _Inner(Contract(app, routes), RouteTable(routes), settings, guard, observe)

    def close(self) -> None:
        """Answer 503 from now on; write the pending lines of the audit log."""
        if self._inner is not None:
            self._inner.audit.write()
        self._inner = None

    def end(self, tenant: str, why: Exception) -> None:
        """Cancel the tenant's requests and answer them with `why`; requests that manage tenants go on."""
        if self._inner is not None:
            self._inner.end(tenant, why)

    async def watch(self) -> None:
        """Cancel requests whose key was revoked or has expired, in a loop that runs until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                if self._inner is not None:
                    await self._inner.check_keys()
            except Exception:
                # No error may end the watch.
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
    def __init__(
        self, app: ASGIApp, table: RouteTable, settings: Settings, guard: Authenticator, observe: Observer
    ) -> None:
        self._app = app
        self._table = table
        self._settings = settings
        self._guard = guard
        self._observe = observe
        self._bodies = BodyBudget(settings.max_body_bytes, settings.max_bodies_bytes)
        # Uploads are passed on in parts and never in memory as a whole, so their sum is not limited.
        self._uploads = BodyBudget(settings.max_upload_bytes, math.inf)
        self._pace = Pace()
        # Tenant and caller of each running request; None for requests that manage tenants.
        self._open: dict[RequestChannel, tuple[str, Caller] | None] = {}
        self._pause = min(_LATE_SECONDS, _LATE_SHARE * settings.request_timeout)
        self._look: asyncio.TimerHandle | None = None
        self.audit = Audit()

    def end(self, tenant: str, why: Exception) -> None:
        for exchange, whose in list(self._open.items()):
            if whose is not None and whose[0] == tenant:
                exchange.end(why)

    def _end_late(self) -> None:
        """Cancel requests past their deadline; schedule the next check while requests are open."""
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
        """Cancel requests whose key is no longer in use."""
        for exchange, whose in list(self._open.items()):
            refusal = None if whose is None else await self._guard.check(whose[1])
            # The request may have been answered during the check.
            if refusal is not None and exchange in self._open:
                exchange.end(refusal)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id()
        scope.setdefault("state", {})["request_id"] = request_id
        access = self._find(scope)
        media = headers.get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
        bulk = access.body == "upload" and media in BULK
        bodies = self._uploads if bulk else self._bodies
        exchange = (UploadChannel if bulk else RequestChannel)(scope, receive, send, bodies, request_id)
        caller, refusal = STRANGER, None
        try:
            admission = await self._admit(scope, access, headers)
            caller = admission.caller
            refusal = _bad_path(scope) or admission.refusal or bodies.refuse_declared(headers)
            if refusal is not None:
                await exchange.respond(refusal)(scope, exchange.receive, exchange.send)
            else:
                scope["state"]["caller"] = caller
                whose = None if access.is_about_tenants else (_tenant(caller, headers), caller)
                self._open[exchange] = whose
                TENANT.set(whose[0] if whose is not None else "")
                if whose is not None and not bulk:
                    self._pace.seen(whose[0])
                    exchange.pace_by(self._pace, whose[0])
                self._look_later()
                await self._run(scope, exchange)
        finally:
            self._open.pop(exchange, None)
            exchange.close()
            caller.use("bytes", exchange.bytes)
            seconds = time.perf_counter() - started
            template = getattr(scope.get("route"), "path", None) if refusal is None else None
            method, path, status = scope["method"], scope["path"], exchange.status or _CLIENT_GONE
            self._observe(method, template, status, seconds)
            if self._settings.access_log:
                log_request(
                    scope,
                    status=status,
                    seconds=seconds,
                    bytes_in=exchange.bytes,
                    bytes_out=exchange.bytes_sent,
                    tenant=_tenant(caller, headers),
                )
            if access.may_change(method):
                self.audit.add(
                    method,
                    path,
                    status,
                    tenant=_tenant(caller, headers),
                    key=caller.key,
                    request_id=request_id,
                    refused=refusal is not None,
                )

    def _find(self, scope: Scope) -> Access:
        """Return the access rule of the request; store it, and the route if one matches, in the scope."""
        route, access = self._table.find(scope)
        if route is not None:
            scope["route"] = route
        scope["state"]["access"] = access
        return access

    async def _admit(self, scope: Scope, access: Access, headers: dict[bytes, bytes]) -> Admission:
        doubtful = _doubtful(scope, headers)
        if doubtful is not None:
            return Admission(STRANGER, doubtful)
        return await self._guard.admit(access, scope["method"], headers)

    async def _run(self, scope: Scope, exchange: RequestChannel) -> None:
        """Run the application; answer with a problem if it raises or was cancelled for a reason."""
        try:
            await exchange.answer(self._app, scope, self._settings.request_timeout)
            if exchange.ended is None:
                return
            answer = exchange.refusal(exchange.ended)
        # No variable may keep the error after this block: its traceback refers to this frame, and only the
        # garbage collector would free that cycle.
        except Exception as error:
            answer = exchange.refusal(error)
        if answer is not None:
            await answer(scope, exchange.receive, exchange.send)


def _bad_path(scope: Scope) -> Problem | None:
    if _CONTROL.search(scope["path"]) is None:
        return None
    return Problem(400, "bad_request", "The path holds a control character. Leave it out.")


def _doubtful(scope: Scope, headers: Mapping[bytes, bytes]) -> Problem | None:
    """Return the refusal of an ambiguous request: no Host, or a repeated header (RFC 9112, 3.2)."""
    if b"host" not in headers and scope.get("http_version", "1.1") == "1.1":
        return Problem(400, "bad_request", "The header Host is missing.")
    if len(headers) == len(scope["headers"]):
        return None
    twice = Counter(name for name, _ in scope["headers"] if name in _ONCE)
    if not twice or (found := twice.most_common(1)[0])[1] == 1:
        return None
    return Problem(400, "bad_request", f"The header {found[0].decode('latin-1')} is there more than once.")


def _tenant(caller: Caller, headers: Mapping[bytes, bytes]) -> str:
    """Return the tenant of the caller's key; for the operator, X-Tenant unchecked; "" for a stranger."""
    if caller.tenant is not None or caller is STRANGER:
        return caller.tenant or ""
    return headers.get(b"x-tenant", b"default").decode("latin-1")
