"""How bytes become requests: uvicorn's protocol around llhttp, with a bound on all that is not a body."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle as Cycle

from service.edge import GONE

# Of a request line with its headers, of a chunk's extensions, of trailers. Common servers allow 8 to 64 KB.
MAX_HEAD_BYTES = 64 << 10
_TOO_LONG = f"The request line and the headers have at most {MAX_HEAD_BYTES:,} bytes.".encode()

# Of a body that is not taken yet: with uvicorn's 64 KB every photograph stops the reading.
_UNREAD_BYTES = 256 << 10
# Nothing follows it at once.
_INTERIM = b"HTTP/1.1 1"


class Whole:
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


class Protocol(HttpToolsProtocol):
    """One connection.

    llhttp keeps a head of any length, so what is read between pieces of bodies is counted: more than the
    bound, and what was read at once, is answered with 431, or with the end of the connection where an answer
    is still to come.
    """

    _beside_body = 0
    _answering: Cycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._when_gone: set[Callable[[], None]] = set()
        super().connection_made(Whole(transport, self.loop))  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # uvicorn tells the newest request alone, and answers the others into nothing.
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.pipeline.clear()
        for tell in tuple(self._when_gone):
            tell()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {GONE: self._when_gone}  # type: ignore[dict-item]

    def data_received(self, data: bytes) -> None:
        self._beside_body += len(data)
        super().data_received(data)
        if self._beside_body > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_refusal())
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        self._beside_body = 0
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
        self._beside_body = 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: Cycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP; but what was asked before it is answered first, and then nothing more.

        uvicorn's 400 would be taken for the answer to the request before it, or stand in the midst of it.
        """
        last: Cycle | None = self.cycle
        answering = self._answering
        if last is not None and last.more_body and last is not answering and self.pipeline:
            # It was to wait, and its own body is what cannot be read.
            self.pipeline.popleft()
            last = self.pipeline[0][0] if self.pipeline else answering
        if last is None or last.response_complete:
            super().send_400_response(msg)
        elif not last.more_body:
            last.keep_alive = False
        elif last.response_started:
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _unsupported_upgrade_warning(self) -> None:
        """What comes behind a request to speak something else is thrown away, so no request may follow."""
        if self.cycle.response_complete:
            self.transport.close()
        self.cycle.keep_alive = False


def _refusal() -> bytes:
    fields = (
        b"content-type: text/plain; charset=utf-8",
        b"content-length: %d" % len(_TOO_LONG),
        b"connection: close",
    )
    status = STATUS_LINE[HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE]
    return status + b"\r\n".join(fields) + b"\r\n\r\n" + _TOO_LONG
