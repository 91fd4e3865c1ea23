"""Callers that ask again as soon as they are answered, and know what became of each request."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit


class Dropped(Exception):
    """The connection ended before the answer did."""


@dataclass
class Loop:
    """One caller in a thread. keep_alive: it keeps its connection for as long as the service lets it.

    Ends when it is told to, or when the service takes no more connections. found: statuses of the answers,
    `reset` for each connection that was reset before its first answer, and `dropped` for each other request
    that was not answered.
    """

    url: str
    request: bytes
    keep_alive: bool
    found: Counter[str] = field(default_factory=Counter)
    refused: bool = False

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Asks it to end, and waits until it has."""
        self._stop.set()
        self.join(timeout)

    def join(self, timeout: float = 30.0) -> None:
        """Waits until it has ended."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "a caller still waits for its answer"

    def _run(self) -> None:
        place = urlsplit(self.url)
        while not self._stop.is_set():
            try:
                connection = socket.create_connection((place.hostname, place.port), timeout=60)
            except ConnectionRefusedError:
                self.refused = True
                return
            answered = self.found.total()
            with connection:
                try:
                    self._ask(connection)
                except (ConnectionResetError, BrokenPipeError):
                    fresh = self.found.total() == answered
                    self.found["reset" if fresh else "dropped"] += 1
                except (Dropped, OSError):
                    self.found["dropped"] += 1

    def _ask(self, connection: socket.socket) -> None:
        while not self._stop.is_set():
            connection.sendall(self.request)
            status, headers = answer(connection)
            self.found[status] += 1
            if not self.keep_alive or headers.get("connection") == "close":
                return


def answer(connection: socket.socket) -> tuple[str, dict[str, str]]:
    """Status and headers of an answer whose body was read to its end. Raises Dropped."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    left = int(headers["content-length"]) - len(body)
    while left > 0:
        left -= len(_more(connection))
    return first.split()[1], headers


def _more(connection: socket.socket) -> bytes:
    piece = connection.recv(65_536)
    if not piece:
        raise Dropped
    return piece


def post(path: str, body: bytes, media: str = "application/json", close: bool = False) -> bytes:
    """A whole request."""
    ending = "connection: close\r\n" if close else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {media}\r\n"
        f"content-length: {len(body)}\r\n{ending}\r\n"
    )
    return head.encode() + body


def total(loops: Sequence[Loop]) -> Counter[str]:
    """The findings of all callers."""
    return sum((loop.found for loop in loops), Counter())
