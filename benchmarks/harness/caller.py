"""A caller with a process and a socket of its own, that asks again and again and notes how long it took.

It is `http.client` on a kept connection. What that costs by itself shows in the time of a GET of /livez.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Request:
    """One request, complete."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Line:
    """One kept connection to the service."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        assert place.hostname is not None
        self._connection = http.client.HTTPConnection(place.hostname, place.port, timeout=600)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: Request) -> bytes:
        """The body of the answer. Raises RuntimeError for a status of 400 or more."""
        self._connection.request(request.method, request.path, request.body, dict(request.headers))
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status >= 400:
            raise RuntimeError(f"{request.method} {request.path} answered {answer.status}: {body[:500]!r}")
        return body

    def seconds(self, request: Request) -> float:
        """How long it took from sending to the last byte of the answer."""
        begin = time.perf_counter()
        self.ask(request)
        return time.perf_counter() - begin


def _time(pipe: Connection, url: str) -> None:
    line = Line(url)
    while (order := pipe.recv()) is not None:
        requests, count = order
        pipe.send([line.seconds(requests[index % len(requests)]) for index in range(count)])


def _repeat(pipe: Connection, url: str) -> None:
    while (requests := pipe.recv()) is not None:
        # Each order gets a new connection: the service cuts idle ones off after ten seconds.
        line = Line(url)
        done = 0
        while not pipe.poll():
            for request in requests:
                line.ask(request)
            done += 1
        pipe.recv()
        pipe.send(done)


class Process:
    """Work in a fresh interpreter that a pipe gives orders to; its context manager ends it."""

    def __init__(self, work: Callable[[Connection, str], None], url: str) -> None:
        # A fork would copy locks that threads of this process hold.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, url), daemon=True)
        self._process.start()
        theirs.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.terminate()
        else:
            self._pipe.send(None)
        self._process.join()


class Timer(Process):
    """Times requests sent one after the other from another process; a context manager."""

    def __init__(self, url: str) -> None:
        super().__init__(_time, url)

    def __enter__(self) -> Timer:
        return self

    def times(self, requests: list[Request], count: int) -> list[float]:
        """Seconds of each of `count` requests, taken in turn from the list. Raises EOFError if one failed."""
        self._pipe.send((requests, count))
        times: list[float] = self._pipe.recv()
        return times


class Repeater(Process):
    """Sends requests over and over from another process between `start` and `stop`; a context manager."""

    def __init__(self, url: str) -> None:
        super().__init__(_repeat, url)

    def __enter__(self) -> Repeater:
        return self

    def start(self, requests: list[Request]) -> None:
        """Begins; returns at once."""
        self._pipe.send(requests)

    def stop(self) -> int:
        """Ends after the round under way; how many rounds were done. Raises EOFError if a request failed."""
        self._pipe.send("stop")
        rounds: int = self._pipe.recv()
        return rounds


def json_request(path: str, body: object, tenant: str) -> Request:
    """A POST of JSON."""
    headers = {"Content-Type": "application/json", "X-Tenant": tenant}
    return Request("POST", path, json.dumps(body).encode(), headers)
