"""How a server ends: what was accepted is answered, and what comes later is refused."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from service.server.connections import ConnectionTable
from service.server.drain import accept_backlog
from tests.support.service.connections import connected
from tests.support.service.load_callers import answer, post
from tests.support.service.raw_server import Bare

ONE = post("/", b"12345", "text/plain")


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers; at once, or after half a second in which it holds up everything, or not."""
    count = len(await Request(scope, receive).body())
    if scope["path"] == "/stops":
        time.sleep(0.5)  # noqa: ASYNC251
    if scope["path"] == "/works":
        await asyncio.sleep(0.5)
    await PlainTextResponse(str(count))(scope, receive, send)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bare]:
    own = ConnectionTable()
    for module in ("protocol", "drain"):
        monkeypatch.setattr(f"service.server.{module}.connections", own)
    with Bare(app, own) as running:
        yield running


def test_what_waits_to_be_accepted_is_answered(bare: Bare) -> None:
    """Connections that the system has accepted while the loop was busy, at the moment of the end."""
    address = bare.address
    with connected(bare.url) as first:
        first.sendall(post("/stops", b"1", "text/plain"))
        time.sleep(0.1)
        waiting = [socket.create_connection(address, timeout=10) for _ in range(20)]
        for connection in waiting:
            connection.sendall(ONE)
        bare.server.should_exit = True
        for connection in (first, *waiting):
            with connection:
                assert answer(connection)[0] == "200"
                assert connection.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=10)
    bare.stop()


def test_the_queue_of_a_listener_is_emptied_before_it_ends() -> None:
    """Another holder of the listener, as a supervisor is, accepts no more connections either."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=16)
    address = listener.getsockname()
    with listener, listener.dup() as supervisors:
        waiting = [socket.create_connection(address, timeout=10) for _ in range(10)]
        taken = accept_backlog(listener.dup())
        assert len(taken) == 10
        assert supervisors.fileno() > 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=10)
        for connection in (*waiting, *taken):
            assert connection.getpeername()
            connection.close()


def test_another_worker_listens_on_what_is_left() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        assert accept_backlog(listener.dup()) == []
        listener.listen(16)
        with socket.create_connection(listener.getsockname(), timeout=10), listener.accept()[0]:
            pass


def test_the_next_request_of_a_connection_is_answered_too(bare: Bare) -> None:
    with connected(bare.url) as used, connected(bare.url) as fresh, connected(bare.url) as working:
        used.sendall(ONE)
        assert answer(used)[0] == "200"
        working.sendall(post("/works", b"12345", "text/plain"))
        time.sleep(0.1)
        bare.server.should_exit = True
        time.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(bare.address, timeout=10)
        for connection in (used, fresh):
            connection.sendall(ONE)
        for connection in (used, fresh, working):
            status, headers = answer(connection)
            assert (status, headers["connection"]) == ("200", "close")
            assert connection.recv(1) == b""
    begun = time.monotonic()
    bare.stop()
    assert time.monotonic() - begun < 1.0


def test_idle_connections_do_not_hold_up_the_end(bare: Bare) -> None:
    with connected(bare.url) as used, connected(bare.url) as fresh:
        used.sendall(ONE)
        assert answer(used)[0] == "200"
        begun = time.monotonic()
        bare.stop()
        assert time.monotonic() - begun < 4.0
        assert used.recv(1) == fresh.recv(1) == b""
