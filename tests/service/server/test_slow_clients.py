"""Clients that send slowly, not at all, or do not read: only they are cut off."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from service.edge.auth import Authenticator
from service.edge.gateway import Edge
from service.edge.routes import Body, DeclaredRoute
from service.monitoring.metrics import Metrics
from service.server import protocol
from service.server.connections import ConnectionTable
from service.settings import Settings
from tests.support.service.connections import connected, problem, received
from tests.support.service.load_callers import answer, post
from tests.support.service.raw_server import Bare

# In place of ten seconds; looks are as much closer to each other.
SECONDS = 0.5
LOOK = 0.05
MOST = 4
LARGE = b"x" * (32 << 20)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Says how long the body is; or sends much; or answers before the body has come."""
    request = Request(scope, receive)
    if scope["path"] == "/large":
        await PlainTextResponse(LARGE)(scope, receive, send)
        return
    if scope["path"] == "/early":
        await PlainTextResponse("enough")(scope, receive, send)
        return
    count = sum([len(chunk) async for chunk in request.stream()])
    await PlainTextResponse(str(count))(scope, receive, send)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bare]:
    own = ConnectionTable(MOST)
    for module in ("protocol", "drain"):
        monkeypatch.setattr(f"service.server.{module}.connections", own)
    monkeypatch.setattr("service.server.connections._LOOK_SECONDS", LOOK)
    monkeypatch.setattr(protocol, "HEAD_SECONDS", SECONDS)
    monkeypatch.setattr(protocol, "SILENT_SECONDS", SECONDS)
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", SECONDS)
    edge = Edge()
    settings = Settings(home=tmp_path, access_log=False, request_timeout=20)

    async def endpoint() -> None:
        """The application answers by itself."""

    routes = [
        DeclaredRoute("POST", "/adapt", endpoint, "adapt", body=Body("upload")),
        DeclaredRoute("POST", "/embed", endpoint, "predict", body=Body("inputs")),
        DeclaredRoute("POST", "/early", endpoint, "predict", body=Body("inputs")),
        DeclaredRoute("GET", "/large", endpoint, "key"),
    ]
    edge.open(
        app, routes, settings=settings, guard=Authenticator(None, ["127.0.0.1"]), observe=Metrics().request
    )
    with Bare(edge, own) as running:
        yield running


def slowly(connection: socket.socket, pieces: Iterator[bytes], pause: float) -> bytes:
    """The bytes received while pieces are sent with pauses, until the service closes."""
    found = b""
    connection.settimeout(pause)
    try:
        for piece in pieces:
            connection.sendall(piece)
            try:
                more = connection.recv(65_536)
            except TimeoutError:
                continue
            if not more:
                break
            found += more
        connection.settimeout(10.0)
        found += received(connection)
    except OSError:
        pass
    return found


def drops(first: bytes, one: bytes, count: int = 10_000) -> Iterator[bytes]:
    yield first
    for _ in range(count):
        yield one


HEAD = b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/plain\r\n"


def seconds(ask: Callable[[], bytes]) -> tuple[float, bytes]:
    begun = time.monotonic()
    found = ask()
    return time.monotonic() - begun, found


def test_who_says_nothing_is_cut_off(bare: Bare) -> None:
    with connected(bare.url) as connection:
        took, found = seconds(lambda: received(connection))
    assert found == b""
    assert SECONDS < took < 3 * SECONDS
    assert bare.connections.cut == {"silent": 1}


@pytest.mark.parametrize("before", [0, 2])
def test_a_head_must_come_in_time_on_a_used_connection_too(bare: Bare, before: int) -> None:
    with connected(bare.url) as connection:
        for _ in range(before):
            connection.sendall(post("/embed", b"12345", "text/plain"))
            assert answer(connection)[0] == "200"
        took, found = seconds(lambda: slowly(connection, drops(HEAD + b"x: ", b"a"), 0.05))
    assert problem(found) == "head_too_slow"
    assert SECONDS < took < 3 * SECONDS
    assert bare.connections.cut == {"head": 1}


@pytest.mark.parametrize("pieces", ["drops", "silence", "chunks"])
def test_a_body_must_come_fast_enough(bare: Bare, pieces: str) -> None:
    length = b"transfer-encoding: chunked" if pieces == "chunks" else b"content-length: 1000000"
    sent = {
        "drops": drops(HEAD + length + b"\r\n\r\n", b"a"),
        "silence": drops(HEAD + length + b"\r\n\r\n" + b"a" * 300_000, b""),
        "chunks": drops(HEAD + length + b"\r\n\r\n", b"1\r\na\r\n"),
    }[pieces]
    with connected(bare.url) as connection:
        took, found = seconds(lambda: slowly(connection, sent, 0.05))
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head.lower()
    assert b"application/problem+json" in head
    assert json.loads(body)["code"] == "request_too_slow"
    assert SECONDS < took < 4 * SECONDS
    assert bare.connections.cut == {"body": 1}


def test_a_body_that_comes_slowly_and_fast_enough_is_read(bare: Bare) -> None:
    """A line of 640 KB a second, for several times as long as nothing may come."""
    count, size = 18, 64 << 10
    with connected(bare.url) as connection:
        begun = time.monotonic()
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % (count * size))
        for _ in range(count):
            time.sleep(0.1)
            connection.sendall(b"x" * size)
        assert answer(connection)[0] == "200"
        assert time.monotonic() - begun > 3 * SECONDS
    assert bare.connections.cut == {}


def test_an_upload_has_a_time_of_its_own(bare: Bare) -> None:
    head = b"POST /adapt HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/csv\r\ncontent-length: 3\r\n\r\n"
    with connected(bare.url) as connection:
        connection.sendall(head + b"1")
        time.sleep(3 * SECONDS)
        connection.sendall(b"23")
        assert answer(connection)[0] == "200"
    assert bare.connections.cut == {}


def test_who_waits_to_be_told_to_go_on_is_not_slow(bare: Bare) -> None:
    """The time of a body begins when the service asks for it."""
    with connected(bare.url) as connection:
        connection.sendall(HEAD + b"expect: 100-continue\r\ncontent-length: 5\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"12345")
        assert answer(connection)[0] == "200"


def test_a_body_that_was_not_waited_for_may_come_late(bare: Bare) -> None:
    with connected(bare.url) as connection:
        connection.sendall(b"POST /early HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\n")
        assert answer(connection)[0] == "200"
        time.sleep(3 * SECONDS)
        connection.sendall(b"12345" + post("/embed", b"12345", "text/plain"))
        assert answer(connection)[0] == "200"
    assert bare.connections.cut == {}


def test_who_does_not_read_is_cut_off(bare: Bare) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(bare.address)
        connection.sendall(b"GET /large HTTP/1.1\r\nhost: localhost\r\n\r\n")
        time.sleep(3 * SECONDS)
        assert bare.connections.cut == {"unread": 1}
        assert len(bare.connections) == 0
        assert len(received(connection)) < len(LARGE)


def test_who_reads_slowly_is_not(bare: Bare) -> None:
    with connected(bare.url) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        count = 0
        begun = time.monotonic()
        while piece := connection.recv(1 << 20):
            count += len(piece)
            time.sleep(max(0.0, count / len(LARGE) * 3 * SECONDS - (time.monotonic() - begun)))
    assert count > len(LARGE)
    assert bare.connections.cut == {}


def test_idle_connections_make_room_and_then_the_newest_is_refused(bare: Bare) -> None:
    one = post("/embed", b"12345", "text/plain")
    unfinished = one[:-1]
    held = [socket.create_connection(bare.address, timeout=10) for _ in range(MOST)]
    try:
        for connection in held:
            connection.sendall(one)
            assert answer(connection)[0] == "200"
        # Two become busy, and the others are seen to be idle.
        for connection in held[:2]:
            connection.sendall(unfinished)
        time.sleep(4 * LOOK)
        for _ in range(2):
            held.append(socket.create_connection(bare.address, timeout=10))
            held[-1].sendall(unfinished)
        time.sleep(LOOK)
        assert bare.connections.cut == {"idle": 2}
        with connected(bare.url) as refused:
            found = received(refused)
        assert problem(found) == "too_many_connections"
        assert b"retry-after: 1" in found
        assert bare.connections.cut == {"idle": 2, "refused": 1}
        for connection in held[2:4]:
            assert connection.recv(1) == b""
        for connection in (*held[:2], *held[4:]):
            connection.sendall(one[-1:])
            assert answer(connection)[0] == "200"
    finally:
        for connection in held:
            connection.close()


def test_the_bound_leaves_descriptors_for_everything_else() -> None:
    connections = ConnectionTable()
    for descriptors, most in ((1 << 20, 4_096), (1_024, 768), (256, 64), (10, 64)):
        connections.bound(descriptors)
        assert connections._most == most


def test_nothing_is_kept_of_connections_that_are_gone(bare: Bare) -> None:
    for _ in range(30):
        with connected(bare.url) as connection:
            connection.sendall(post("/embed", b"12345", "text/plain", close=True))
            assert b" 200 " in received(connection)
    deadline = time.monotonic() + 5.0
    while len(bare.connections):
        assert time.monotonic() < deadline
        time.sleep(LOOK)
    assert not any(bare.connections._parts)
    assert not bare.connections._idle
    assert math.isclose(sum(bare.connections.cut.values()), 0)
