"""What every request passes through around the routes: id, guard, limits, deadline, metrics, log."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from adapters.store import is_tenant
from service.errors import Problem, respond

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from adapters.uploads import Form
    from service.auth import Caller, Guard
    from service.metrics import Metrics
    from service.settings import Settings

logger = logging.getLogger("topwork")
access = logging.getLogger("topwork.access")
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
# What an upload must come at, over all of it.
_SLOWEST_BYTES_PER_SECOND = 64 << 10
# Between looks for keys of requests under way that are in use no more.
_LOOK_SECONDS = 1.0
# For so much of the request timeout nothing may come, while somebody waits for it.
_SILENT = 0.25

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
_LOGGED_PATH = 200
_EXAMPLES = "/examples/"
_PRINTED = "/:@!$&'()*+,;="
# The operator's, which end no request of their own.
_ABOUT_TENANTS = "/tenants"
_CLIENT_GONE = 499  # nginx's number: nobody is there to read a status


# A name for this process and a number: to ask the system for so many random bytes is a twentieth of the work.
_PROCESS = os.urandom(10).hex()
_numbers = itertools.count()


def _new_id() -> str:
    return f"{_PROCESS}{next(_numbers):012x}"


# How a server tells that a caller has hung up: in the scope's extensions, the set of what it calls then. A
# server without one is asked, by a task for each request.
GONE = "topwork.gone"
# What the server puts beside it for a body that comes too slowly: why it waits no longer. It wakes who reads.
SLOW = "topwork.slow"
# What says there that the body has a time of its own.
UNHURRIED = "topwork.unhurried"


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
            await respond(problem, _new_id())(scope, receive, send)
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
        self._uploads = _Bodies(settings.max_upload_bytes, math.inf)
        self._open: dict[_Exchange, tuple[str, Caller]] = {}

    def end(self, tenant: str, why: Exception) -> None:
        """See Edge.end."""
        for exchange, (whose, _) in list(self._open.items()):
            if whose == tenant:
                exchange.end(why)

    async def check_keys(self) -> None:
        """Breaks off what goes on under keys that are in use no more."""
        for exchange, (_, caller) in list(self._open.items()):
            refusal = await self._guard.check(caller)
            # It may have been answered meanwhile.
            if refusal is not None and exchange in self._open:
                exchange.end(refusal)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        caller: Caller | None
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else _new_id()
        scope.setdefault("state", {})["request_id"] = request_id
        media = headers.get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
        bulk = scope["path"] == "/adapt" and media in BULK
        bodies = self._uploads if bulk else self._bodies
        exchange = (_Upload if bulk else _Exchange)(receive, send, bodies, request_id)
        try:
            refusal = await self._refusal(scope, headers) or bodies.refuse_declared(headers)
            if refusal is not None:
                await respond(refusal, request_id)(scope, exchange.receive, exchange.send)
            else:
                if not scope["path"].startswith(_ABOUT_TENANTS):
                    caller = scope["state"]["caller"]
                    self._open[exchange] = (_tenant(caller, headers), caller)
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
                path = _logged(scope["path"])
                access.info("%s %s %d %.1fms %s", scope["method"], path, status, seconds * 1e3, request_id)
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

    async def _run(self, scope: Scope, exchange: _Exchange) -> None:
        """The routes' answer, or a problem: whatever escapes them, and a deadline that passes."""
        timeout = self._settings.request_timeout
        try:
            async with asyncio.timeout(timeout) as deadline:
                exchange.give(deadline, timeout)
                await exchange.answer(self._app, scope)
            if exchange.ended is None:
                return
            answer = exchange.refusal(exchange.ended)
        # No name for the error outlives this: its traceback holds this frame, which would hold the error, and
        # only a garbage collection would end that.
        except TimeoutError:
            detail = exchange.TOO_LONG.format(timeout)
            answer = exchange.refusal(Problem(504, "deadline_exceeded", detail))
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
    path = _logged(scope["path"])
    audit.info("%s %s %d tenant=%s key=%s %s", scope["method"], path, status, who, caller.key, request_id)


def _tenant(caller: Caller, headers: Mapping[bytes, bytes]) -> str:
    """Who the request is for, or what its header says."""
    return caller.tenant or headers.get(b"x-tenant", b"default").decode("latin-1")


def _logged(path: str) -> str:
    """The path as it is logged: in printable ASCII, and without an example's id, which logs would keep."""
    kept, examples, _ = path.partition(_EXAMPLES)
    return quote((kept + examples)[:_LOGGED_PATH], safe=_PRINTED)


class _Exchange:
    """One request's channel: counts its body, notes the status, stops the work when the caller hangs up."""

    TOO_LONG = "The request took more than {:g} seconds. Send less at once."

    def __init__(self, receive: Receive, send: Send, bodies: _Bodies, request_id: str) -> None:
        self.status: int | None = None
        self.ended: Exception | None = None
        self.request_id = request_id
        self._receive = receive
        self._send = send
        self._bodies = bodies
        self.bytes = 0
        self._body_read = False
        self._gone = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self._when_gone: set[Callable[[], None]] | None = None
        self._extensions: dict[str, Any] = {}
        self._watch: asyncio.Task[None] | None = None
        self._cancelled = False

    def give(self, deadline: asyncio.Timeout, seconds: float) -> None:
        """The deadline, and how long it gives."""

    def refusal(self, error: Exception) -> Response | None:
        """What to answer instead of what failed; None where an answer has begun."""
        return respond(error, self.request_id) if self.status is None else None

    async def answer(self, app: ASGIApp, scope: Scope) -> None:
        """Runs the application; cancels it once the caller has gone, for nobody will read the answer."""
        self._work = asyncio.current_task()
        self._extensions = scope.get("extensions", self._extensions)
        self._when_gone = self._extensions.get(GONE)
        if self._when_gone is not None:
            self._when_gone.add(self._hung_up)
        try:
            await app(scope, self.receive, self.send)
        except asyncio.CancelledError:
            if not self._cancelled or self._work is None or self._work.uncancel():
                raise

    async def _cancel_when_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._hung_up()

    def end(self, why: Exception) -> None:
        """Breaks off the work; an answer that has begun stays unfinished."""
        self.ended = why
        if self._work is not None:
            self._cancelled = True
            self._work.cancel()

    def _hung_up(self) -> None:
        self._gone.set()
        if self.status is None and self._work is not None:
            self._cancelled = True
            self._work.cancel()

    async def receive(self) -> Message:
        if self._body_read:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone.set()
            self._body_read = True
            return message
        body = message.get("body", b"")
        if not body and SLOW in self._extensions:
            raise Problem(408, "request_too_slow", self._extensions[SLOW], headers={"Connection": "close"})
        self.bytes = self._bodies.take(self.bytes, len(body))
        if not message.get("more_body", False):
            self._body_read = True
            if self._when_gone is None:
                self._watch = asyncio.create_task(self._cancel_when_gone())
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
        self._bodies.give_back(self.bytes)
        if self._when_gone is not None:
            self._when_gone.discard(self._hung_up)
        if self._watch is not None:
            self._watch.cancel()


class _Upload(_Exchange):
    """A bulk upload's channel. It gets time for what it has sent, and may not fall silent."""

    TOO_LONG = "The upload waited for {:g} seconds, or came very slowly. Try again later, or send less."

    def give(self, deadline: asyncio.Timeout, seconds: float) -> None:
        self._deadline = deadline
        self._seconds = seconds
        self._began = asyncio.get_running_loop().time()

    async def answer(self, app: ASGIApp, scope: Scope) -> None:
        scope.get("extensions", {})[UNHURRIED] = True
        await super().answer(app, scope)

    async def receive(self) -> Message:
        if self._body_read:
            return await super().receive()
        silent = _SILENT * self._seconds
        try:
            async with asyncio.timeout(silent):
                message = await super().receive()
        except TimeoutError as error:
            detail = f"No byte of the upload came for {silent:g} seconds. Send it again."
            raise Problem(408, "upload_stalled", detail, headers={"Connection": "close"}) from error
        since = self._began + self.bytes / _SLOWEST_BYTES_PER_SECOND
        if not message.get("more_body", False):
            # What is left to do has the time of any request.
            since = asyncio.get_running_loop().time()
        if not self._deadline.expired():
            self._deadline.reschedule(since + self._seconds)
        return message


class _Bodies:
    """Counts the bytes of request bodies, of each and of all that are being answered."""

    def __init__(self, max_one: int, max_all: float) -> None:
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
