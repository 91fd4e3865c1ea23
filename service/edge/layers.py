"""The layers of the edge: ASGI applications around the routes, each with one job."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from adapters.examples.upload_forms import MEDIA_TYPES
from adapters.threads import TENANT
from service.edge.access_log import log_request
from service.edge.auth import Authenticator
from service.edge.channel import BodyBudget, RequestChannel, UploadChannel, channel_of
from service.edge.pace import Pace
from service.errors import Problem
from service.server.scope import new_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from service.edge.audit import Audit
    from service.edge.routes import BodyKind, RouteTable
    from service.settings import Settings

Layer = Callable[["ASGIApp"], "ASGIApp"]
Observer = Callable[[str, "str | None", int, float], None]
"""Called for each request with its method, its route template (None without a match), status and seconds."""

SMALL_BODY = 1 << 20  # bytes; more than any setting, promotion or relabelling needs
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_GONE = 499  # nginx's status for a caller that hung up; recorded, never sent

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
# Route patterns also match before a final newline, and no name in a path may contain control characters.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def layered(app: ASGIApp, layers: Sequence[Layer]) -> ASGIApp:
    """Return the application inside its layers, the first of which is the outermost."""
    for layer in reversed(layers):
        app = layer(app)
    return app


class Channels:
    """Finds the declared route of each request, and opens the channel that the other layers share."""

    def __init__(self, app: ASGIApp, table: RouteTable, settings: Settings) -> None:
        self._app = app
        self._table = table
        self._bodies = BodyBudget(settings.max_bodies_bytes)
        # Uploads are passed on in parts and never in memory as a whole, so their sum is not limited.
        self._uploads = BodyBudget(math.inf)
        small = min(SMALL_BODY, settings.max_body_bytes)
        self._most: Mapping[BodyKind, int] = {
            "none": small,
            "small": small,
            "inputs": settings.max_body_bytes,
            "upload": settings.max_body_bytes,
        }
        self._most_of_upload = settings.max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id()
        route, access = self._table.find(scope)
        if route is not None:
            scope["route"] = route
        media = headers.get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
        is_upload = access.body == "upload" and media in MEDIA_TYPES
        channel = (UploadChannel if is_upload else RequestChannel)(
            scope,
            receive,
            send,
            request_id=request_id,
            headers=headers,
            access=access,
            bodies=self._uploads if is_upload else self._bodies,
            most=self._most_of_upload if is_upload else self._most[access.body],
        )
        state = scope.setdefault("state", {})
        state["request_id"], state["channel"] = request_id, channel
        try:
            await self._app(scope, channel.receive, channel.send)
        finally:
            channel.close()
            # The channel leads back to the scope by way of the server's `receive`.
            del state["channel"]


class Records:
    """Records each request in the metrics, in the access log and, if it may change data, in the audit log."""

    def __init__(self, app: ASGIApp, observe: Observer, access_log: bool, audit: Audit) -> None:
        self._app = app
        self._observe = observe
        self._access_log = access_log
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        channel = channel_of(scope)
        try:
            await self._app(scope, receive, send)
        finally:
            seconds = time.perf_counter() - started
            method, path, status = scope["method"], scope["path"], channel.status or _CLIENT_GONE
            template = None if channel.refused else getattr(scope.get("route"), "path", None)
            self._observe(method, template, status, seconds)
            if self._access_log:
                log_request(scope, channel, status, seconds)
            if channel.access.may_change(method):
                self._audit.add(
                    method,
                    path,
                    status,
                    tenant=channel.tenant,
                    key=channel.caller.key,
                    request_id=channel.request_id,
                    refused=channel.refused,
                )


class HeaderChecks:
    """Refuses requests that two components might read differently."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        channel = channel_of(scope)
        refusal = _ambiguous(scope, channel.headers)
        if refusal is not None:
            await channel.refuse(refusal, scope)
            return
        await self._app(scope, receive, send)


class Authentication:
    """Refuses callers that may not call the route; charges the others for the bytes that they send."""

    def __init__(self, app: ASGIApp, guard: Authenticator) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        channel = channel_of(scope)
        admission = await self._guard.admit(channel.access, scope["method"], channel.headers)
        channel.identify(admission.caller)
        if admission.refusal is not None:
            await channel.refuse(admission.refusal, scope)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            channel.caller.use("bytes", channel.bytes)


class RequestChecks:
    """Refuses paths that no route can mean, and bodies that declare too many bytes, before they are read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        channel = channel_of(scope)
        refusal = _bad_path(scope) or channel.refuse_declared()
        if refusal is not None:
            await channel.refuse(refusal, scope)
            return
        await self._app(scope, receive, send)


class TenantShares:
    """Has the tenants of requests take turns: on the threads and, with large bodies, on the event loop."""

    def __init__(self, app: ASGIApp, pace: Pace) -> None:
        self._app = app
        self._pace = pace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        channel = channel_of(scope)
        about_tenants = channel.access.is_about_tenants
        TENANT.set("" if about_tenants else channel.tenant)
        if not about_tenants and channel.is_paced:
            self._pace.seen(channel.tenant)
            channel.pace_by(self._pace)
        await self._app(scope, receive, send)


class ErrorAnswers:
    """Answers with a problem if the application raises, or was cancelled for a reason."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        channel = channel_of(scope)
        try:
            await self._app(scope, receive, send)
            if channel.ended is None:
                return
            answer = channel.refusal(channel.ended)
        # No variable may keep the error after this block: its traceback refers to this frame, and only the
        # garbage collector would free that cycle.
        except Exception as error:
            answer = channel.refusal(error)
        if answer is not None:
            await answer(scope, receive, send)


def _bad_path(scope: Scope) -> Problem | None:
    if _CONTROL.search(scope["path"]) is None:
        return None
    return Problem(400, "bad_request", "The path has a control character. Remove it.")


def _ambiguous(scope: Scope, headers: Mapping[bytes, bytes]) -> Problem | None:
    """Return the refusal of an ambiguous request: no Host, or a repeated header (RFC 9112, 3.2)."""
    if b"host" not in headers and scope.get("http_version", "1.1") == "1.1":
        return Problem(400, "bad_request", "The header Host is missing.")
    if len(headers) == len(scope["headers"]):
        return None
    twice = Counter(name for name, _ in scope["headers"] if name in _ONCE)
    if not twice or (found := twice.most_common(1)[0])[1] == 1:
        return None
    return Problem(400, "bad_request", f"The header {found[0].decode('latin-1')} was sent more than once.")
