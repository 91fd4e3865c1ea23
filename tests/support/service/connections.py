"""Connections that send and receive bytes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    """A TCP connection to the service."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        yield connection


def send(connection: socket.socket, pieces: Iterable[bytes]) -> int:
    """Send pieces until the service closes; return the number of bytes sent."""
    sent = 0
    try:
        for piece in pieces:
            connection.sendall(piece)
            sent += len(piece)
    except OSError:
        pass
    return sent


def received(connection: socket.socket) -> bytes:
    """Everything until the service closes or resets the connection."""
    found = b""
    try:
        while piece := connection.recv(65_536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def problem(answer: bytes) -> str:
    """The error code of a refusal, whose form is checked."""
    head, _, body = answer.partition(b"\r\n\r\n")
    told = json.loads(body)
    lines = head.lower().split(b"\r\n")
    assert b"content-type: application/problem+json" in lines
    assert b"x-request-id: " + told["request_id"].encode() in lines
    assert b"connection: close" in lines
    assert lines[0].startswith(b"http/1.1 %d " % told["status"])
    assert told["detail"]
    return str(told["code"])
