"""What every request passes through around the routes: id, guard, limits, deadline, metrics, log."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from service.errors import Problem, respond

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from adapters.uploads import Form
    from service.auth import Guard
    from service.metrics import Metrics
    from service.settings import Settings

access = logging.getLogger("topwork.access")

BULK: Mapping[str, Form] = {
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "text/csv": "csv",
    "application/zip": "zip",
    "application/x-zip-compressed": "zip",
}
"""The form of a bulk upload by its media type."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOGGED_PATH = 200
_UPLOADS = 8
_CLIENT_GONE = 499  # nginx's number: nobody is there to read a status


class Edge:
    """An ASGI application around the routes. Mounted before the routes exist; until `open` it answers 503."""

    def __init__(self) -> None:
        self._inner: _Inner | None = None

    def open(self, app: ASGIApp, *, settings: Settings, guard: Guard, metrics: Metrics) -> None:
        """Lets requests through to the routes."""
        self._inner = _Inner(app, settings, guard, metrics)

    def close(self) -> None:
        """Answers 503 from now on."""
        self._inner = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000, "reason": "no websockets here"})
            return
        if self._inner is None:
            problem = Problem(
                503, "not_ready", "The service is starting or stopping.", headers={"Retry-After": "1"}
            )
            await respond(problem, uuid.uuid4().hex)(scope, receive, send)
            return
        await self._inner(scope, receive, send)


class _Inner:
    def __init__(self, app: ASGIApp, settings: Settings, guard: Guard, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._guard = guard
        self._metrics = metrics
        self._bodies = _Bodies(settings.max_body_bytes, settings.max_bodies_bytes)
        # Uploads go through in parts: their bytes are on the way, and not in memory.
        self._uploads = _Bodies(settings.max_upload_bytes, _UPLOADS * settings.max_upload_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        media = headers.get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
        bodies = self._uploads if scope["path"] == "/adapt" and media in BULK else self._bodies
        exchange = _Exchange(receive, send, bodies, request_id)
        try:
            refusal = self._guard.check(scope["path"], headers) or bodies.refuse_declared(headers)
            if refusal is not None:
                await respond(refusal, request_id)(scope, exchange.receive, exchange.send)
            else:
                await self._run(scope, exchange)
        finally:
            exchange.close()
            seconds = time.perf_counter() - started
            template = getattr(scope.get("route"), "path", None)
            status = exchange.status or _CLIENT_GONE
            self._metrics.request(scope["method"], template, status, seconds)
            if self._settings.access_log:
                path = scope.get("raw_path", b"").decode("latin-1")[:_LOGGED_PATH]
                access.info("%s %s %d %.1fms %s", scope["method"], path, status, seconds * 1e3, request_id)

    async def _run(self, scope: Scope, exchange: _Exchange) -> None:
        """The routes' answer, or a problem: whatever escapes them, and a deadline that passes."""
        timeout = self._settings.request_timeout
        try:
            async with asyncio.timeout(timeout):
                await exchange.answer(self._app, scope)
            return
        except TimeoutError:
            problem: Exception = Problem(
                504,
                "deadline_exceeded",
                f"The request took more than {timeout:g} seconds. Send less at once.",
            )
        except Exception as error:
            problem = error
        if exchange.status is None:
            await respond(problem, exchange.request_id)(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request's channel: counts its body, notes the status, stops the work when the caller hangs up."""

    def __init__(self, receive: Receive, send: Send, bodies: _Bodies, request_id: str) -> None:
        self.status: int | None = None
        self.request_id = request_id
        self._receive = receive
        self._send = send
        self._bodies = bodies
        self._bytes = 0
        self._body_read = asyncio.Event()
        self._gone = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    async def answer(self, app: ASGIApp, scope: Scope) -> None:
        """Runs the application; cancels it once the caller has gone, for nobody will read the answer."""
        work = asyncio.ensure_future(app(scope, self.receive, self.send))
        self._watch = asyncio.ensure_future(self._cancel_when_gone(work))
        try:
            await work
        except asyncio.CancelledError:
            if not self._gone.is_set():
                raise

    async def _cancel_when_gone(self, work: asyncio.Future[None]) -> None:
        await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        if self.status is None:
            work.cancel()

    async def receive(self) -> Message:
        if self._body_read.is_set():
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone.set()
            self._body_read.set()
            return message
        self._bytes = self._bodies.take(self._bytes, len(message.get("body", b"")))
        if not message.get("more_body", False):
            self._body_read.set()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {
                **message,
                "headers": [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())],
            }
        await self._send(message)

    def close(self) -> None:
        """Ends the watch for the caller's hanging up; the body counts no more."""
        self._bodies.give_back(self._bytes)
        if self._watch is not None:
            self._watch.cancel()


class _Bodies:
    """Counts the bytes of request bodies, of each and of all that are being answered."""

    def __init__(self, max_one: int, max_all: int) -> None:
        self._max_one = max_one
        self._max_all = max_all
        self._held = 0

    def refuse_declared(self, headers: dict[bytes, bytes]) -> Problem | None:
        """The refusal of a body whose announced length is too large, before a byte of it is read."""
        try:
            length = int(headers.get(b"content-length", b"0"))
        except ValueError:
            return Problem(400, "bad_request", "Content-Length is not a number.")
        return self._too_large() if length > self._max_one else None

    def take(self, before: int, more: int) -> int:
        """Bytes of the body so far. Raises a 413 Problem for this body, a 429 one for all bodies together."""
        if before + more > self._max_one:
            raise self._too_large()
        if self._held + more > self._max_all:
            raise Problem(
                429,
                "overloaded",
                "Too many bytes of requests are being worked on; try again later.",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        self._held += more
        return before + more

    def give_back(self, taken: int) -> None:
        """The request is answered."""
        self._held -= taken

    def _too_large(self) -> Problem:
        return Problem(
            413,
            "body_too_large",
            f"The body is larger than {self._max_one:,} bytes. Send fewer items at once.",
            headers={"Connection": "close"},
        )
