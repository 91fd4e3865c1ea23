"""How bytes become requests: uvicorn's protocol around llhttp, with a bound on all that is not a body."""

from __future__ import annotations

from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

# Of a request line with its headers, of a chunk's extensions, of trailers. Common servers allow 8 to 64 KB.
MAX_HEAD_BYTES = 64 << 10
_TOO_LONG = f"The request line and the headers have at most {MAX_HEAD_BYTES:,} bytes.".encode()


class Protocol(HttpToolsProtocol):
    """One connection.

    llhttp keeps a head of any length, so what is read between pieces of bodies is counted: more than the
    bound, and what was read at once, is answered with 431, or with the end of the connection where an answer
    is still to come.
    """

    _beside_body = 0

    def data_received(self, data: bytes) -> None:
        self._beside_body += len(data)
        super().data_received(data)
        if self._beside_body > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_refusal())
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        self._beside_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._beside_body = 0
        super().on_message_complete()


def _refusal() -> bytes:
    fields = (
        b"content-type: text/plain; charset=utf-8",
        b"content-length: %d" % len(_TOO_LONG),
        b"connection: close",
    )
    status = STATUS_LINE[HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE]
    return status + b"\r\n".join(fields) + b"\r\n\r\n" + _TOO_LONG
