"""Many connections kept busy from a process of its own: what a service does under load, seen from outside.

One thread, one epoll, requests that were made bytes beforehand. What a request costs this side is in
`Round.cpu_seconds`: on a small machine it is taken from the service.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

from benchmarks.harness.caller import Process, Request

_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection:\s*close", re.IGNORECASE)
_ADVICE = re.compile(rb"\r\nretry-after:", re.IGNORECASE)
_CHUNK = 1 << 18
# An answer that takes longer is not waited for.
_PATIENCE = 60.0


class NoAnswer(RuntimeError):
    """A request was not answered, or with what is not HTTP."""


@dataclass(frozen=True, slots=True)
class Order:
    """The requests to send in turn, the number of connections, and the duration.

    count: requests after which to end, whatever the time. rate: requests a second at fixed instants, whatever
    becomes of those before; None sends the next one when the last one on the connection is answered.
    """

    requests: Sequence[Request]
    connections: int
    seconds: float
    count: int | None = None
    rate: float | None = None


@dataclass(slots=True)
class Round:
    """The answers. seconds: from the first request to the last answer.

    latencies: seconds of the answers below 400, each from the instant it was to be sent (with a rate) or was
    sent, until its last byte could be read: what this client does before and after is not the service's.
    refused: of the others. advised: refusals that say when to come again. late: requests of a fixed rate
    that found no free connection, and were not sent. cpu_seconds: of this client.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    advised: int = 0
    late: int = 0

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return len(self.latencies) / self.seconds

    def checked(self) -> Round:
        """Return this round. Raises RuntimeError if requests were refused."""
        if self.refused:
            raise RuntimeError(f"requests were refused: {dict(self.statuses)}")
        return self


class Load(Process):
    """Sends what it is ordered to, to one service; a context manager."""

    def __init__(self, url: str) -> None:
        super().__init__(_send, url)

    def __enter__(self) -> Load:
        return self

    def begin(self, order: Order) -> None:
        """Begins; returns at once."""
        self._pipe.send(order)

    def end(self) -> Round:
        """Waits for the end of what was begun. Raises NoAnswer."""
        found = self._pipe.recv()
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, Round)
        return found

    def run(self, order: Order) -> Round:
        """Begins, and waits for the end. Raises NoAnswer."""
        self.begin(order)
        return self.end()


def _send(pipe: Connection, url: str) -> None:
    while (order := pipe.recv()) is not None:
        sender = _Sender(url, order)
        try:
            pipe.send(sender.run())
        except NoAnswer as error:
            pipe.send(error)
        finally:
            sender.close()


def _encoded(request: Request, host: str) -> bytes:
    lines = [f"{request.method} {request.path} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    if request.body or request.method == "POST":
        lines.append(f"Content-Length: {len(request.body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + request.body


class _Channel:
    """One connection, with one request under way at most."""

    __slots__ = ("answer", "due", "head", "length", "socket")

    def __init__(self, place: tuple[str, int]) -> None:
        self.socket = socket.create_connection(place)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due = 0.0
        self.answer = bytearray()
        self.head = -1
        self.length: int | None = None

    def ask(self, request: bytes, due: float | None) -> None:
        """due: when it was to be sent; None: now."""
        self.answer.clear()
        self.head = -1
        self.due = time.perf_counter() if due is None else due
        self.socket.sendall(request)

    def read(self) -> bool:
        """Takes what there is; whether the answer is complete. Raises NoAnswer."""
        piece = self.socket.recv(_CHUNK)
        if not piece:
            raise NoAnswer(f"the connection was closed after {len(self.answer)} bytes of an answer")
        self.answer += piece
        if self.head < 0:
            self.head = self.answer.find(b"\r\n\r\n")
            if self.head < 0:
                return False
            found = _LENGTH.search(self.answer, 0, self.head)
            self.length = int(found[1]) if found else None
            if found is None and not _CHUNKED.search(self.answer, 0, self.head):
                raise NoAnswer(f"an answer without a length: {bytes(self.answer[: self.head])!r}")
        if self.length is None:
            return self.answer.endswith(b"0\r\n\r\n")
        return len(self.answer) >= self.head + 4 + self.length

    def says(self, pattern: re.Pattern[bytes]) -> bool:
        return pattern.search(self.answer, 0, self.head) is not None

    @property
    def status(self) -> int:
        return int(self.answer[9:12])


class _Sender:
    def __init__(self, url: str, order: Order) -> None:
        place = urlsplit(url)
        assert place.hostname is not None
        assert place.port is not None
        self._place = (place.hostname, place.port)
        self._order = order
        host = f"{place.hostname}:{place.port}"
        self._requests: Iterator[bytes] = cycle([_encoded(request, host) for request in order.requests])
        self._epoll = select.epoll()
        self._channels: dict[int, _Channel] = {}
        self._idle: deque[_Channel] = deque()
        self._round = Round()
        self._sent = 0

    def close(self) -> None:
        for channel in self._channels.values():
            channel.socket.close()
        self._epoll.close()

    def run(self) -> Round:
        for _ in range(self._order.connections):
            self._open()
        cpu = time.process_time()
        begin = time.perf_counter()
        self._until = begin + self._order.seconds
        if self._order.rate is None:
            self._closed(begin)
        else:
            self._at_rate(begin, self._order.rate)
        self._round.seconds = time.perf_counter() - begin
        self._round.cpu_seconds = time.process_time() - cpu
        return self._round

    def _more(self, now: float) -> bool:
        return now < self._until and (self._order.count is None or self._sent < self._order.count)

    def _closed(self, now: float) -> None:
        while self._idle and self._more(now):
            self._ask(self._idle.popleft(), None)
        while len(self._idle) < self._order.connections:
            for channel in self._answered(_PATIENCE):
                now = time.perf_counter()
                if self._more(now):
                    self._ask(channel, None)
                else:
                    self._idle.append(channel)

    def _at_rate(self, begin: float, rate: float) -> None:
        while True:
            now = time.perf_counter()
            due = begin + self._sent / rate
            if due >= self._until or not self._more(due):
                break
            if now < due:
                self._idle.extend(self._answered(due - now))
                continue
            if self._idle:
                self._ask(self._idle.popleft(), due)
            else:
                self._sent += 1
                self._round.late += 1
                self._idle.extend(self._answered(0))
        while len(self._idle) < self._order.connections:
            self._idle.extend(self._answered(_PATIENCE))

    def _open(self) -> None:
        channel = _Channel(self._place)
        self._channels[channel.socket.fileno()] = channel
        self._epoll.register(channel.socket, select.EPOLLIN)
        self._idle.append(channel)

    def _ask(self, channel: _Channel, due: float | None) -> None:
        self._sent += 1
        channel.ask(next(self._requests), due)

    def _answered(self, patience: float) -> list[_Channel]:
        """The channels on which an answer has become complete, after `patience` seconds at the latest."""
        events = self._epoll.poll(patience)
        now = time.perf_counter()
        if not events and patience >= _PATIENCE:
            raise NoAnswer(f"nothing was answered for {patience:g} seconds")
        return [channel for number, _ in events if (channel := self._read(number, now)) is not None]

    def _read(self, number: int, now: float) -> _Channel | None:
        channel = self._channels[number]
        if not channel.read():
            return None
        seconds = now - channel.due
        self._round.statuses[channel.status] += 1
        if channel.status < 400:
            self._round.latencies.append(seconds)
        else:
            self._round.refused.append(seconds)
            self._round.advised += channel.says(_ADVICE)
        if not channel.says(_CLOSES):
            return channel
        self._epoll.unregister(channel.socket)
        del self._channels[number]
        channel.socket.close()
        self._open()
        return self._idle.pop()
