"""Limits of connections besides bodies, against the running service, byte by byte."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from benchmarks.harness.service_process import Serving
from service.server.connections import connections
from service.server.protocol import MAX_HEAD_BYTES
from tests.support.service.calls import get, post, texts
from tests.support.service.connections import connected, problem, received, send
from tests.support.service.raw_server import Bare

LINE = b"x-filling: " + b"a" * 1_000 + b"\r\n"
TEXT = b"content-type: text/plain\r\n"


def begun(method: str = "POST", path: str = "/predict?adapter=none") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n".encode()


def endless(line: bytes) -> Iterator[bytes]:
    while True:
        yield line


@pytest.mark.parametrize(
    "pieces",
    [
        (begun("GET", "/backbones"), LINE),
        (b"GET /", b"a" * 1_000),
        (begun("GET", "/backbones") + b"x-filling: ", b"a" * 1_000),
        (b"", b"\r\n"),
    ],
    ids=["headers", "path", "one header", "nothing"],
)
def test_a_head_without_end_is_ended(server: str, pieces: tuple[bytes, bytes]) -> None:
    def sending() -> Iterator[bytes]:
        yield pieces[0]
        yield from endless(pieces[1])

    with connected(server) as connection:
        sent = send(connection, sending())
        answer = received(connection)
    # The service reads or drops what the kernel buffers, and keeps nothing.
    assert sent < 32 << 20
    assert not answer or answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))


def test_a_long_head_is_answered_as_such(server: str) -> None:
    with connected(server) as connection:
        send(connection, [begun("GET", "/backbones"), LINE * (MAX_HEAD_BYTES // len(LINE) + 1)])
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert problem(answer) == "head_too_large"
    assert b"65,536 bytes" in answer


def test_a_head_below_the_bound_is_read(server: str) -> None:
    with connected(server) as connection:
        filling = LINE * (MAX_HEAD_BYTES // len(LINE) - 2)
        send(connection, [begun("GET", "/backbones"), filling, b"connection: close\r\n\r\n"])
        assert received(connection).startswith(b"HTTP/1.1 200 ")


def chunks(size: int, count: int) -> bytes:
    return (b"%x\r\n" % size + b"a" * size + b"\r\n") * count


def test_a_body_in_small_chunks_is_read(server: str) -> None:
    """Their lines together are longer than the bound, and yet are not a head."""
    count = MAX_HEAD_BYTES // 3
    with connected(server) as connection:
        head = begun() + TEXT + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        send(connection, [head, chunks(1, count), b"0\r\n\r\n"])
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"/docs/errors#unknown_adapter" in answer


def test_trailers_and_extensions_without_end_are_ended(server: str) -> None:
    head = begun() + TEXT + b"transfer-encoding: chunked\r\n\r\n" + chunks(4, 2)
    for begin, line in ((b"0\r\n", LINE), (b"4;extension=", b"a" * 1_000)):
        with connected(server) as connection:
            sent = send(connection, [head + begin, *[line] * 60_000])
            received(connection)
        assert sent < 32 << 20


def test_requests_one_after_the_other_are_counted_each_by_itself(server: str) -> None:
    filling = LINE * (MAX_HEAD_BYTES // len(LINE) // 2)
    one = begun("GET", "/backbones") + filling + b"\r\n"
    last = begun("GET", "/backbones") + filling + b"connection: close\r\n\r\n"
    with connected(server) as connection:
        send(connection, [one, one, one, last])
        assert received(connection).count(b"HTTP/1.1 200 ") == 4


def test_a_head_without_a_body_comes_too(server: str) -> None:
    """A head waits for what follows at once; here nothing does."""
    with connected(server) as connection:
        send(connection, [begun("HEAD", "/docs") + b"connection: close\r\n\r\n"])
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 ")
    assert answer.endswith(b"\r\n\r\n")


def test_who_waits_to_be_told_to_go_on_is_told(server: str) -> None:
    body = b"hello"
    with connected(server) as connection:
        expecting = f"expect: 100-continue\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        send(connection, [begun() + TEXT + expecting.encode()])
        assert connection.recv(65_536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        send(connection, [body])
        assert received(connection).startswith(b"HTTP/1.1 404 ")


def test_whose_caller_hung_up_is_not_worked_on(server: str) -> None:
    """Many large requests, each left alone at once, are not embedded."""
    text = "a long sentence about nothing in particular " * 50
    post(f"{server}/adapt", {"adapter": "left-alone", "examples": texts(4)})
    many = json.dumps(
        {"adapter": "left-alone", "inputs": [{"text": f"{n} {text}"} for n in range(128)]}
    ).encode()
    head = f"content-type: application/json\r\ncontent-length: {len(many)}\r\n\r\n".encode()
    for _ in range(8):
        with connected(server) as connection:
            send(connection, [begun(path="/predict") + head + many])
            time.sleep(0.05)
    deadline = time.monotonic() + 5
    while b'topwork_queue_depth{backbone="minilm-l6-v2"} 0.0' not in get(f"{server}/metrics")[1]:
        assert time.monotonic() < deadline, "it works for nobody"


GOOD = begun("GET", "/backbones") + b"\r\n"
CHUNKED = begun() + TEXT + b"transfer-encoding: chunked\r\n\r\n"


def statuses(url: str, data: bytes) -> list[int]:
    """The statuses of all answers on one connection."""
    with connected(url) as connection:
        send(connection, [data])
        return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d+) ", received(connection))]


@pytest.mark.parametrize("before", [1, 3])
@pytest.mark.parametrize(
    "bad",
    [
        b"NONSENSE\r\n\r\n",
        begun("GET", "evil:1") + b"\r\n",
        begun("GET", "/backbones") + b"a b: c\r\n\r\n",
        CHUNKED + b"xyz\r\n" + GOOD,
    ],
    ids=["line", "target", "field", "chunk"],
)
def test_what_was_asked_before_what_is_no_request_is_answered(server: str, bad: bytes, before: int) -> None:
    """A 400 that comes at once would be taken for the answer to the first request."""
    assert statuses(server, GOOD * before + bad + GOOD) == [200] * before
    with connected(server) as connection:
        send(connection, [bad + GOOD])
        assert problem(received(connection)) == "invalid_http"


def test_nothing_follows_a_wish_to_speak_something_else(server: str) -> None:
    upgrade = begun("GET", "/backbones") + b"connection: upgrade\r\nupgrade: h2c\r\n\r\n"
    assert statuses(server, upgrade + GOOD) == [200]


def test_who_asks_much_and_hangs_up_leaves_no_failure_behind(serving: Serving) -> None:
    slow = json.dumps(
        {"backbone": "minilm-l6-v2", "inputs": [{"text": f"word {n} " * 60} for n in range(64)]}
    )
    with connected(serving.url) as connection:
        head = (
            begun(path="/embed")
            + f"content-type: application/json\r\ncontent-length: {len(slow)}\r\n\r\n".encode()
        )
        send(connection, [(head + slow.encode()) * 2 + GOOD])
        time.sleep(0.1)
    deadline = time.monotonic() + 5
    while serving.log.read_text(errors="replace").count("POST /embed 499") < 1:
        assert time.monotonic() < deadline, "it works for nobody"
        time.sleep(0.05)
    assert statuses(serving.url, GOOD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")) == [200]
    log = serving.log.read_text(errors="replace")
    assert "Traceback" not in log
    assert "without starting response" not in log


def test_trailers_are_no_headers() -> None:
    """Trailers are dropped, sent with the head or after it: no check of headers sees them."""
    seen: list[list[tuple[bytes, bytes]]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        seen.append(list(scope["headers"]))
        await PlainTextResponse("done")(scope, receive, send)

    head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nx-tenant: one\r\n\r\n"
    trailers = b"0\r\nx-tenant: other\r\nauthorization: Bearer x\r\n\r\n"
    with Bare(app, connections) as bare:
        for pieces in ((head + b"1\r\na\r\n" + trailers,), (head, b"1\r\na\r\n", trailers)):
            with connected(bare.url) as connection:
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(0.1)
                assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
    expected = [(b"host", b"a"), (b"transfer-encoding", b"chunked"), (b"x-tenant", b"one")]
    assert seen == [expected, expected]
