"""How bytes become requests: uvicorn's protocol around llhttp, with bounds on what is sent and how slowly."""

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

# Of a request line with its headers, of a chunk's extensions, of trailers. Common servers allow 8 to 64 KB.
MAX_HEAD_BYTES = 64 << 10
_TOO_LONG = f"The request line and the headers have at most {MAX_HEAD_BYTES:,} bytes."

# For a request line with its headers, from its first byte on; and for that byte, from the connection on.
HEAD_SECONDS = 10.0
# Without a byte of a body; and what all of it must come at, after so many seconds.
SILENT_SECONDS = 10.0
SLOWEST_BYTES_PER_SECOND = 64 << 10
# Without a byte of an answer being read.
UNREAD_SECONDS = 20.0
# For what was sent before its sender could know that the service ends: to the second look after that.
_PARTING_SECONDS = 0.5
_LATE_HEAD = f"The request line and the headers must come within {HEAD_SECONDS:g} seconds."
_LATE_BODY = (
    f"The body came too slowly: less than {SLOWEST_BYTES_PER_SECOND >> 10} KB a second, or nothing for "
    f"{SILENT_SECONDS:g} seconds. Send it again."
)
_NO_HTTP = "This is not HTTP/1.1 as it may be sent."
_NO_ROOM = "Too many connections are open; try again later."

# Of a body that is not taken yet: with uvicorn's 64 KB every photograph stops the reading.
_UNREAD_BYTES = 256 << 10
# Nothing follows it at once.
_INTERIM = b"HTTP/1.1 1"


class CoalescingTransport:
    """A transport that sends the head of an answer together with what follows at once.

    uvicorn writes them one after the other, and each write is a system call, a packet, and a client that
    wakes.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head: bytes | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Sends the data, or keeps it for this round of the event loop if it is a head."""
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.writelines((head, data))
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(_INTERIM):
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Sends what is kept, and closes."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.write(head)


class _Phase(Enum):
    FRESH = auto()
    """Not a byte has come."""
    HEAD = auto()
    BODY = auto()
    WORK = auto()
    """The service is to do something: answer, or read on."""
    IDLE = auto()
    """Everything is answered."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection.

    llhttp keeps a head of any length, so what is read between pieces of bodies is counted: more than the
    bound, and what was read at once, is answered with 431, or with the end of the connection where an answer
    is still to come.

    Nothing waits for time here: `look`, once a second, sees how far things are and how far they were. So a
    request that comes at once and is answered at once costs nothing more; uvicorn's own timer between
    requests is done without. part: where it is among the connections.
    """

    part = 0
    # Bytes read, and how many they were at the end of the last piece of a body.
    _read = 0
    _mark = 0
    # What was seen at the last look: the phase and whose, since when, bytes read, bytes not sent.
    _phase: _Phase | None = None
    _of: Any = None
    _age = 0.0
    _begun_at = 0
    _read_before = 0
    _silent = 0.0
    _unsent = 0
    _unread = 0.0
    _told = 0.0
    _scorer: Cycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._when_gone: set[Callable[[], None]] = set()
        # Every answer is the last one.
        self._leaving = connections.draining
        super().connection_made(CoalescingTransport(transport, self.loop))  # type: ignore[arg-type]
        if not connections.admit(self):
            self.transport.write(_refusal(503, "too_many_connections", _NO_ROOM, b"retry-after: 1"))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        connections.discard(self)
        super().connection_lost(exc)
        # uvicorn tells the newest request alone, and answers the others into nothing.
        if self._scorer is not None and not self._scorer.response_complete:
            self._scorer.disconnected = True
            self._scorer.message_event.set()
        self.pipeline.clear()
        for tell in tuple(self._when_gone):
            tell()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {GONE: self._when_gone}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # uvicorn adds the trailers of a chunked body to its list; they are no headers (RFC 9110, 6.5.1).
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
        # As uvicorn has it, but without a timer for each answer: the looks close what is idle.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def _start_asgi_task(self, cycle: Cycle, app: ASGI3Application) -> None:
        self._scorer = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP; but what was asked before it is answered first, and then nothing more.

        uvicorn's 400 would be taken for the answer to the request before it, or stand in the midst of it.
        """
        last: Cycle | None = self.cycle
        scorer = self._scorer
        if last is not None and last.more_body and last is not scorer and self.pipeline:
            # It was to wait, and its own body is what cannot be read.
            self.pipeline.popleft()
            last = self.pipeline[0][0] if self.pipeline else scorer
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
        """What comes behind a request to speak something else is thrown away, so no request may follow."""
        if self.cycle.response_complete:
            self.transport.close()
        self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Answers what has come, and what was sent before its sender could know; then closes."""
        self._leaving = True
        self._phase = None
        cycle = self.cycle
        if cycle is not None and not cycle.response_started:
            cycle.keep_alive = False

    @property
    def idle(self) -> bool:
        """Whether nothing has come that is not answered."""
        return self._now() in (_Phase.IDLE, _Phase.FRESH)

    def _now(self) -> _Phase:
        # Until the first head has begun, and has come, there are none.
        cycle: Any = self.cycle
        scope: Any = self.scope
        if cycle is None:
            return _Phase.FRESH if scope is None else _Phase.HEAD
        if cycle.response_complete:
            # A body that was not waited for may still come: it begins no request.
            return _Phase.IDLE if scope is cycle.scope else _Phase.HEAD
        waits = cycle.more_body and not self.flow.read_paused and not cycle.waiting_for_100_continue
        return _Phase.BODY if waits else _Phase.WORK

    def look(self, passed: float) -> None:
        """Cuts the connection off if it is too slow. passed: seconds since the last look."""
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
        """Has whoever reads a body that comes too slowly refuse it; where nobody does, closes."""
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
    """A problem as the application answers one, for what never comes so far."""
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
