"""Which URLs may be called back, and what they are told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adapters.jobs import callbacks
from adapters.jobs.callbacks import CallbackNotAllowed, check_callback, send_callback
from adapters.registry.records import JobRecord

ALLOWED = ("https://hooks.example.com/topwork/", "http://10.0.0.5:8080/done")


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/topwork/",
        "https://hooks.example.com/topwork/a?b=c",
        "https://HOOKS.example.com/topwork/a",
        "http://10.0.0.5:8080/done",
    ],
)
def test_what_lies_below_an_allowed_url_may_be_called(url: str) -> None:
    check_callback(url, ALLOWED)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/",
        "https://hooks.example.com/topwork",
        "https://hooks.example.com/topwork/../admin",
        "https://hooks.example.com/topwork/%2e%2e/admin",
        "http://hooks.example.com/topwork/a",
        "https://hooks.example.com:444/topwork/a",
        "https://hooks.example.com.evil.org/topwork/a",
        "https://hooks.example.com@evil.org/topwork/a",
        "https://evil.org\\@hooks.example.com/topwork/a",
        "https://user:word@hooks.example.com/topwork/a",
        "http://10.0.0.5:8080/done/more",
        "http://10.0.0.5:8080/done\r\nHost: evil.org",
        "http://10.0.0.5:port/done",
        "file:///etc/passwd",
        "",
    ],
)
def test_nothing_else_may(url: str) -> None:
    with pytest.raises(CallbackNotAllowed):
        check_callback(url, ALLOWED)


class Listener(ThreadingHTTPServer):
    """Answers with the statuses in turn, then 200, and keeps what it was told."""

    def __init__(self, statuses: list[int]) -> None:
        self.told: list[tuple[str, dict[str, object]]] = []
        self.statuses = statuses
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Listener)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.told.append((self.path, json.loads(body)))
        self.send_response(server.statuses.pop(0) if server.statuses else 200)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def listening(statuses: list[int]) -> Iterator[Listener]:
    """A server that answers."""
    server = Listener(statuses)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def job(url: str) -> JobRecord:
    now = datetime.now(UTC)
    return JobRecord(
        id="1",
        tenant="acme",
        adapter_uid="f" * 32,
        adapter="pets",
        kind="fine_tune",
        state="failed",
        request={"callback": url},
        progress=None,
        attempt=1,
        lease_until=None,
        cancel_requested=False,
        deadline_at=None,
        version=None,
        error_code="diverged",
        error_detail="The loss became nan.",
        created_at=now,
        started_at=now,
        finished_at=now,
    )


def test_the_end_is_told_again_until_it_is_heard_and_no_redirect_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(callbacks, "_PAUSES", (0.0, 0.05, 0.05))
    with listening([302, 500]) as listener:
        send_callback(job(f"http://127.0.0.1:{listener.server_port}/done?key=1"))
        end = time.monotonic() + 20
        while len(listener.told) < 3 and time.monotonic() < end:
            time.sleep(0.02)
    assert [path for path, _ in listener.told] == ["/done?key=1"] * 3
    assert listener.told[-1][1] == {
        "id": "1",
        "adapter": "pets",
        "kind": "fine_tune",
        "state": "failed",
        "version": None,
        "error": {"code": "diverged", "detail": "The loss became nan."},
    }
