"""From bytes to requests: uvicorn's protocol around llhttp, with limits on sizes and on slow clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle as Cycle

from service.errors import problem_body
from service.server.connections import connections
from service.server.scope import GONE, SLOW, UNHURRIED, new_id

# Maximum size of the request line with the headers, of a chunk's extensions, and of trailers. Common servers
# allow 8 to 64 KB.
MAX_HEAD_BYTES = 64 << 10
_TOO_LONG = f"The request line and the headers have at most {MAX_HEAD_BYTES:,} bytes."

# Time from the connection to the first byte, and from that to the end of the headers.
HEAD_SECONDS = 10.0
# Time without a byte of the body, and the minimum average rate of the body once that time has passed.
SILENT_SECONDS = 10.0
SLOWEST_BYTES_PER_SECOND = 64 << 10
# Time in which the client reads nothing of a waiting response.
UNREAD_SECONDS = 20.0
# Drain grace for requests already on the wire. In effect, it lasts until the second check after shutdown.
_PARTING_SECONDS = 0.5
_LATE_HEAD = f"The request line and the headers must arrive within {HEAD_SECONDS:g} seconds."
_LATE_BODY = (
    f"The body arrived too slowly: less than {SLOWEST_BYTES_PER_SECOND >> 10} KB a second, or nothing for "
    f"{SILENT_SECONDS:g} seconds. Send it again."
)
_NO_HTTP = "The request is not valid HTTP/1.1."
_NO_ROOM = "Too many connections are open. Try again later."

# Size of the unread part of a body at which reading pauses. uvicorn's 64 KB would pause it for every photo.
_UNREAD_BYTES = 256 << 10


class _Phase(Enum):
    FRESH = auto()
    """No byte has been received."""
    HEAD = auto()
    BODY = auto()
    WORK = auto()
    """The client waits for the service to answer, or to resume reading."""
    IDLE = auto()
    """Every request has been answered."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One HTTP connection, with limits on the size of heads and on slow clients.

    llhttp accepts heads of any length, so the bytes read between pieces of bodies are counted. More than
    MAX_HEAD_BYTES, plus up to one read, is answered with 431, or with the end of the connection if another
    answer is still pending.

    There are no timers: `look` compares the state with the previous one, once a second. So requests that are
    sent and answered promptly cost nothing extra, and uvicorn's keep-alive timer is not used.
    `part`: the part of the connection table.
    """

    part = 0
    # Bytes read in total, and up to the last piece of a body.
    _read = 0
    _mark = 0
    # State at the last check: the phase, its scope and its age in seconds, bytes read, bytes not sent.
    _phase: _Phase | None = None
    _of: Any = None
    _age = 0.0
    _begun_at = 0
    _read_before = 0
    _silent = 0.0
    _unsent = 0
    _unread = 0.0
    _told = 0.0
    _answering: Cycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._when_gone: set[Callable[[], None]] = set()
        # While draining, a connection closes after its next answer.
        self._leaving = connections.draining
        super().connection_made(transport)
        if not connections.admit(self):
            self.transport.write(_refusal(503, "too_many_connections", _NO_ROOM, b"retry-after: 1"))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        connections.discard(self)
        super().connection_lost(exc)
        # uvicorn notifies only the newest request, although an earlier one may still be running.
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.pipeline.clear()
        for tell in tuple(self._when_gone):
            tell()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {GONE: self._when_gone}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # uvicorn appends the trailers of a chunked body to its list; they are not headers (RFC 9110, 6.5.1).
        self.scope["headers"] = self.headers.copy()
        if self._leaving:
            self.cycle.keep_alive = False

    def handle_websocket_upgrade(self) -> None:
        connections.discard(self)
        super().handle_websocket_upgrade()

    def data_received(self, data: bytes) -> None:
        self._read += len(data)
        super().data_received(data)
        if self._read - self._mark > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_refusal(431, "head_too_large", _TOO_LONG))
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        self._mark = self._read
        cycle = self.cycle
        if (
            cycle.response_complete
            or self.parser.should_upgrade()
            or len(cycle.body) + len(body) > _UNREAD_BYTES
        ):
            super().on_body(body)
        else:
            cycle.body += body
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._mark = self._read
        super().on_message_complete()

    def on_response_complete(self) -> None:
        # The same as in uvicorn, but without a timer for each answer: `look` closes idle connections.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def _start_asgi_task(self, cycle: Cycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid HTTP. Earlier requests are answered first, and the connection closes afterwards.

        uvicorn's 400 would be taken for the answer to an earlier request, or appear in the middle of it.
        """
        last: Cycle | None = self.cycle
        answering = self._answering
        if last is not None and last.more_body and last is not answering and self.pipeline:
            # The invalid data is in the body of this queued request, so it is dropped.
            self.pipeline.popleft()
            last = self.pipeline[0][0] if self.pipeline else answering
        if last is None or last.response_complete:
            self._refuse_what_came()
        elif not last.more_body:
            last.keep_alive = False
        elif last.response_started:
            self.transport.close()
        else:
            self._refuse_what_came()

    def _refuse_what_came(self) -> None:
        self.transport.write(_refusal(400, "invalid_http", _NO_HTTP))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Let no request follow a request to upgrade, because the data after it is discarded."""
        if self.cycle.response_complete:
            self.transport.close()
        self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Answer the requests received and those already on the wire, then close."""
        self._leaving = True
        self._phase = None
        cycle = self.cycle
        if cycle is not None and not cycle.response_started:
            cycle.keep_alive = False

    @property
    def idle(self) -> bool:
        """Whether no request is being received or answered."""
        return self._now() in (_Phase.IDLE, _Phase.FRESH)

    def _now(self) -> _Phase:
        # `scope` is None until the first head begins, and `cycle` until that head is complete.
        cycle: Any = self.cycle
        scope: Any = self.scope
        if cycle is None:
            return _Phase.FRESH if scope is None else _Phase.HEAD
        if cycle.response_complete:
            # The rest of an unread body may still arrive, which does not begin a request.
            return _Phase.IDLE if scope is cycle.scope else _Phase.HEAD
        waits = cycle.more_body and not self.flow.read_paused and not cycle.waiting_for_100_continue
        return _Phase.BODY if waits else _Phase.WORK

    def look(self, passed: float) -> None:
        """Cut the connection off if its client is too slow. `passed`: seconds since the last check."""
        unsent = self.transport.get_write_buffer_size()
        self._unread = self._unread + passed if unsent and unsent >= self._unsent else 0.0
        self._unsent = unsent
        if self._unread > UNREAD_SECONDS:
            connections.cut["unread"] += 1
            self.transport.abort()
        if self.transport.is_closing():
            return
        phase = self._now()
        if phase is not self._phase or self.scope is not self._of:
            self._phase, self._of, self._age = phase, self.scope, 0.0
            self._begun_at = self._read_before = self._read
            self._silent = self._told = 0.0
            return
        self._age += passed
        if phase is _Phase.BODY:
            self._look_at_body(passed)
        elif phase is _Phase.HEAD and self._age > HEAD_SECONDS:
            connections.cut["head"] += 1
            self.transport.write(_refusal(408, "head_too_slow", _LATE_HEAD))
            self.transport.close()
        elif phase in (_Phase.FRESH, _Phase.IDLE) and self._age > self._idle_seconds(phase):
            connections.cut["silent"] += phase is _Phase.FRESH and not self._leaving
            self.transport.close()

    def _idle_seconds(self, phase: _Phase) -> float:
        if self._leaving:
            return _PARTING_SECONDS
        return HEAD_SECONDS if phase is _Phase.FRESH else self.timeout_keep_alive

    def _look_at_body(self, passed: float) -> None:
        """Make the reader of a slow body refuse it. If the reader does not in SILENT_SECONDS, close."""
        self._silent = 0.0 if self._read != self._read_before else self._silent + passed
        self._read_before = self._read
        slow = self._age > SILENT_SECONDS + (self._read - self._begun_at) / SLOWEST_BYTES_PER_SECOND
        extensions: Any = self.scope["extensions"]
        if not (slow or self._silent > SILENT_SECONDS) or UNHURRIED in extensions:
            return
        connections.cut["body"] += not self._told
        self._told += passed
        extensions[SLOW] = _LATE_BODY
        self.cycle.message_event.set()
        if self._told > SILENT_SECONDS:
            self.transport.close()


def _refusal(status: int, code: str, detail: str, *more: bytes) -> bytes:
    """Return a problem as the application would, for a request that does not reach it."""
    request_id = new_id()
    body = json.dumps(problem_body(status, code, detail, request_id)).encode()
    fields = (
        b"content-type: application/problem+json",
        b"content-length: %d" % len(body),
        b"x-request-id: " + request_id.encode(),
        b"connection: close",
        *more,
    )
    return STATUS_LINE[status] + b"\r\n".join(fields) + b"\r\n\r\n" + body
