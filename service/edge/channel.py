"""The channel between a request and its route, and what the edge knows of the request."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adapters.storage.artifact import is_tenant
from service.edge.auth import STRANGER
from service.edge.pace import SMALL_BYTES
from service.errors import Problem, is_openai, respond
from service.server.scope import GONE, SLOW, UNHURRIED

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from service.edge.auth import Caller
    from service.edge.pace import Pace
    from service.edge.routes import Access

# Lowest average rate of an upload, beyond the request timeout.
_SLOWEST_BYTES_PER_SECOND = 64 << 10
# Longest wait for the next bytes of an upload, as a share of the request timeout.
_SILENT = 0.25


class RequestChannel:
    """Counts the body of one request, records its status, and cancels its work when the caller hangs up."""

    TOO_LONG = "The request took more than {:g} seconds. Send less at once."

    is_paced = True  # whether a large body waits while its tenant is over its share of the event loop

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        request_id: str,
        headers: Mapping[bytes, bytes],
        access: Access,
        bodies: BodyBudget,
        most: int,
    ) -> None:
        """`most`: bytes that the body may have. `bodies`: those of all bodies together."""
        self.access = access
        self.headers = headers
        self.status: int | None = None
        self.ended: Exception | None = None
        self.request_id = request_id
        self.caller = STRANGER
        self.tenant = ""  # whose adapters are meant; empty for a stranger and for an invalid name
        self.refused = False  # whether a layer has answered in place of the route
        self.in_vain = False  # whether no item was valid: then the request costs as much as a refused one
        self._items = 0
        self._path = scope["path"]
        self._head = scope["method"] == "HEAD"
        self._receive = receive
        self._send = send
        self._bodies = bodies
        self._most = most
        self.bytes = 0
        self.bytes_sent = 0
        self.adapter: str | None = None  # for the log, if the path does not name it
        # Large bodies wait for the pace; `_reserved` are the milliseconds that it set aside for this one.
        self._pace: Pace | None = None
        self._reserved = 0.0
        # Deadline by time.monotonic().
        self.until = math.inf
        self._body_read = False
        self._has_gone = False
        # Set when the caller hangs up; created only for the few requests that wait for that.
        self._gone: asyncio.Event | None = None
        self._work: asyncio.Task[None] | None = None
        self._when_gone: set[Callable[[], None]] | None = None
        self._extensions: dict[str, Any] = {}
        self._watch: asyncio.Task[None] | None = None
        self._cancelled = False

    def identify(self, caller: Caller) -> None:
        """Record who sent the request. The operator names a tenant in X-Tenant."""
        self.caller = caller
        if caller.tenant is not None:
            self.tenant = caller.tenant
        elif caller is not STRANGER:
            named = self.headers.get(b"x-tenant", b"default").decode("latin-1")
            self.tenant = named if is_tenant(named) else ""

    def known_tenant(self) -> str:
        """Return the tenant. Raises a 422 Problem if X-Tenant has an invalid name."""
        if not self.tenant:
            raise Problem(
                422,
                "invalid_tenant",
                "X-Tenant must be 1 to 63 of a-z, 0-9, dot, underscore and dash, and begin with a "
                "letter or digit.",
            )
        return self.tenant

    def count_items(self, count: int) -> None:
        """Count the items of the request against its caller's quotas."""
        self.caller.use("items", count)
        self._items = count

    def pace_by(self, pace: Pace) -> None:
        """Make a body of more than SMALL_BYTES wait while the tenant is over its share of the event loop."""
        self._pace = pace

    def refuse_declared(self) -> Problem | None:
        """Return the refusal of a body whose Content-Length is too large or invalid, before it is read."""
        try:
            length = int(self.headers.get(b"content-length", b"0"))
        except ValueError:
            return Problem(400, "bad_request", "Content-Length is not a number.")
        return self._too_large() if length > self._most else None

    async def refuse(self, error: Exception, scope: Scope) -> None:
        """Answer with a problem; the request does not reach its route."""
        self.refused = True
        await self.respond(error)(scope, self.receive, self.send)

    def refusal(self, error: Exception) -> Response | None:
        """Return the response to an error; None if an answer has begun."""
        return self.respond(error) if self.status is None else None

    def respond(self, error: Exception) -> Response:
        """Return the response to any exception, in the error format of the path."""
        return respond(error, self.request_id, openai=is_openai(self._path))

    async def answer(self, app: ASGIApp, scope: Scope, seconds: float) -> None:
        """Run the application; cancel it if the caller hangs up before the answer has begun.

        The deadline `until` is `seconds` from now. RunningRequests checks it; this method does not.
        """
        self.until = time.monotonic() + seconds
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
        finally:
            # Only the application may be cancelled, not what runs after it.
            self._work = None
            self.until = math.inf

    async def _cancel_when_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._hung_up()

    def end(self, why: Exception) -> None:
        """Cancel the work; an answer that has begun stays incomplete. Only the first reason counts."""
        if self._work is not None and not self._cancelled:
            self.ended = why
            self._cancel(self._work)

    def _hung_up(self) -> None:
        self._has_gone = True
        if self._gone is not None:
            self._gone.set()
        if self.status is None and self._work is not None and not self._cancelled:
            self._cancel(self._work)

    def _cancel(self, work: asyncio.Task[None]) -> None:
        self._cancelled = True
        work.cancel()

    async def receive(self) -> Message:
        if self._body_read:
            if not self._has_gone:
                self._gone = self._gone or asyncio.Event()
                await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._has_gone = self._body_read = True
            return message
        body = message.get("body", b"")
        if not body and SLOW in self._extensions:
            raise Problem(408, "request_too_slow", self._extensions[SLOW], headers={"Connection": "close"})
        before = self.bytes
        if before + len(body) > self._most:
            raise self._too_large()
        self._bodies.take(len(body))
        self.bytes += len(body)
        if self._pace is not None and before <= SMALL_BYTES < self.bytes:
            # A request that is refused or hangs up while it waits has cost nothing, so close() skips it.
            pace, self._pace = self._pace, None
            self._reserved = await pace.wait(self.tenant)
            self._pace = pace
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
        elif self._head:
            message = {**message, "body": b""}
        else:
            self.bytes_sent += len(message.get("body", b""))
        await self._send(message)

    def close(self) -> None:
        """Stop watching for a hang-up, release the body's bytes and settle the tenant's pace."""
        self._bodies.give_back(self.bytes)
        if self._pace is not None and self.bytes > SMALL_BYTES:
            refused = 400 <= (self.status or 0) < 500 or self.in_vain
            self._pace.settle(self.tenant, self._reserved, self.bytes, self._items, refused=refused)
        if self._when_gone is not None:
            self._when_gone.discard(self._hung_up)
        if self._watch is not None:
            self._watch.cancel()

    def _too_large(self) -> Problem:
        return Problem(
            413,
            "body_too_large",
            f"The body is larger than {self._most:,} bytes. Send fewer items at once.",
            headers={"Connection": "close"},
        )


class UploadChannel(RequestChannel):
    """The channel of a bulk upload: each byte received extends its deadline, and silence ends it."""

    is_paced = False
    TOO_LONG = "The upload waited for {:g} seconds, or was too slow. Try again later, or send less."

    async def answer(self, app: ASGIApp, scope: Scope, seconds: float) -> None:
        self._seconds = seconds
        self._began = time.monotonic()
        scope.get("extensions", {})[UNHURRIED] = True
        await super().answer(app, scope, seconds)

    async def receive(self) -> Message:
        if self._body_read:
            return await super().receive()
        silent = _SILENT * self._seconds
        try:
            async with asyncio.timeout(silent):
                message = await super().receive()
        except TimeoutError as error:
            detail = f"No byte of the upload arrived for {silent:g} seconds. Send it again."
            raise Problem(408, "upload_stalled", detail, headers={"Connection": "close"}) from error
        since = self._began + self.bytes / _SLOWEST_BYTES_PER_SECOND
        if not message.get("more_body", False):
            # Work after the last byte gets the full request timeout.
            since = time.monotonic()
        self.until = since + self._seconds
        return message


class BodyBudget:
    """Limits the bytes of all bodies together whose requests are in progress."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._held = 0

    def take(self, more: int) -> None:
        """Count `more` bytes. Raises a 429 Problem if all bodies together are too large."""
        if self._held + more > self._most:
            raise Problem(
                429,
                "overloaded",
                "Too many large requests are in progress. Try again later.",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        self._held += more

    def give_back(self, taken: int) -> None:
        """Release the bytes of an answered request."""
        self._held -= taken


def channel_of(scope: Scope) -> RequestChannel:
    """Return the channel of a request that has come through the edge."""
    channel: RequestChannel = scope["state"]["channel"]
    return channel
