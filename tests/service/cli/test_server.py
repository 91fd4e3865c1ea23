"""`topwork serve` says when it is ready."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any, cast

import pytest

from service.cli.server import _announce


class Ready(BaseHTTPRequestHandler):
    """Answers every request with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def test_readiness_is_asked_for_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    running = cast(Any, SimpleNamespace(should_exit=False))
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        asking = threading.Thread(target=_announce, args=(url, running))
        asking.start()
        asking.join(5.0)
        running.should_exit = True
        asking.join()
        server.shutdown()
    assert capsys.readouterr().out == f"Topwork is ready at {url}\n"
