"""A server that receives callbacks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Listener(ThreadingHTTPServer):
    """Answers with the statuses in turn, then 200, and keeps requests: `told` parsed, `received` raw."""

    def __init__(self, statuses: list[int]) -> None:
        self.told: list[tuple[str, dict[str, object]]] = []
        self.received: list[tuple[Message, bytes]] = []
        self.statuses = statuses
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Listener)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.received.append((self.headers, body))
        server.told.append((self.path, json.loads(body)))
        self.send_response(server.statuses.pop(0) if server.statuses else 200)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def listening(statuses: list[int]) -> Iterator[Listener]:
    """A running listener."""
    server = Listener(statuses)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
