"""A bucket that hangs, is slow or is gone: what is waited for, and when calls are refused at once."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from adapters.storage.artifact import Artifact, CorruptArtifact, MissingArtifact, StoreUnavailable
from adapters.storage.breaker import Breaker
from adapters.storage.bucket import BucketStore, Patience
from benchmarks.harness.bucket_process import BucketProcess
from tests.support.conditions import until
from tests.support.storage import unavailable

UID = "0" * 31 + "1"
# Far above what any call takes that is refused at once, far below what a single one waits for an answer.
AT_ONCE = 1.0


@pytest.fixture(scope="module")
def process() -> Iterator[BucketProcess]:
    """An S3 server that can hang."""
    try:
        running = BucketProcess()
    except ImportError as error:
        unavailable("s3", str(error))
    with running:
        yield running


@pytest.fixture
def impatient(process: BucketProcess) -> Iterator[BucketStore]:
    """A store that waits for 2 seconds instead of 5; the server answers again afterwards."""
    yield BucketStore(process.url, process.options, Patience(silence=2.0, copy=2.0))
    process.resume()


def test_calls_are_refused_at_once_after_two_without_an_answer(
    process: BucketProcess, impatient: BucketStore, caplog: pytest.LogCaptureFixture
) -> None:
    kept = impatient.publish("acme", UID, b"head")
    process.hang()
    for _ in range(2):
        assert impatient.available
        with pytest.raises(StoreUnavailable):
            impatient.read("acme", UID, kept)
    assert not impatient.available
    calls: list[Callable[[], object]] = [
        lambda: impatient.read("acme", UID, kept),
        lambda: impatient.publish("acme", UID, b"more"),
        lambda: impatient.delete("acme", UID, [kept]),
        lambda: list(impatient.objects()),
        lambda: impatient.delete_adapter("acme", UID),
        impatient.identity,
    ]
    begun = time.monotonic()
    for call in calls:
        with pytest.raises(StoreUnavailable):
            call()
    assert time.monotonic() - begun < AT_ONCE
    process.resume()
    until(lambda: impatient.available, seconds=20)
    assert impatient.read("acme", UID, kept) == b"head"
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [
        "the bucket does not answer; calls are refused until it does",
        "the bucket answers again",
    ]


@pytest.mark.parametrize("call", ["publish", "delete", "objects", "put_aside", "delete_tenant"])
def test_no_kind_of_call_waits_for_long(process: BucketProcess, impatient: BucketStore, call: str) -> None:
    kept = impatient.publish("acme", UID, b"head")
    found = list(impatient.objects())
    calls: dict[str, Callable[[], object]] = {
        "publish": lambda: impatient.publish("acme", UID, b"more"),
        "delete": lambda: impatient.delete("acme", UID, [kept]),
        "objects": lambda: list(impatient.objects()),
        "put_aside": lambda: impatient.put_aside(found),
        "delete_tenant": lambda: impatient.delete_tenant("acme"),
    }
    process.hang()
    begun = time.monotonic()
    with pytest.raises(StoreUnavailable):
        calls[call]()
    # Not the 30 seconds that the client waits by itself.
    assert time.monotonic() - begun < 10.0


def test_answers_do_not_open_the_breaker(process: BucketProcess, impatient: BucketStore) -> None:
    kept = impatient.publish("acme", UID, b"head")
    wrong = Artifact("0" * 64, 4, kept.nonce)
    impatient.put("acme", UID, kept, b"head")
    elsewhere = BucketStore("s3://no-such-bucket/artifacts", process.options)
    for _ in range(4):
        with pytest.raises(MissingArtifact):
            impatient.read("acme", UID, wrong)
        with pytest.raises(StoreUnavailable):
            elsewhere.publish("acme", UID, b"head")
        with suppress(CorruptArtifact):
            impatient.put("acme", UID, wrong, b"head")
    assert impatient.available
    assert elsewhere.available


def test_a_server_that_is_gone_opens_the_breaker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1"}
    gone = BucketStore("s3://topwork", {**options, "access_key_id": "test", "secret_access_key": "test"})
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            gone.identity()
    assert not gone.available


class Trickle:
    """An HTTP server that sends its one answer in parts, with a pause before each; `whole`: all of them."""

    def __init__(self, body: bytes, *, parts: int, pause: float, whole: bool = True) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        size = len(body) // parts
        self._parts = [body[start : start + size] for start in range(0, size * (parts if whole else 1), size)]
        self._length = len(body)
        self._pause = pause
        self._ended = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def options(self) -> dict[str, str]:
        """The options that lead to it."""
        endpoint = "http://{}:{}".format(*self._listening.getsockname())
        return {"endpoint": endpoint, "region": "us-east-1", "access_key_id": "a", "secret_access_key": "b"}

    def close(self) -> None:
        """End it."""
        self._ended.set()
        self._listening.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            head = f'HTTP/1.1 200 OK\r\nContent-Length: {self._length}\r\nETag: "1"\r\n'
            connection.sendall((head + "Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n\r\n").encode())
            for part in self._parts:
                if self._ended.wait(self._pause):
                    return
                connection.sendall(part)
            self._ended.wait(60.0)


def test_a_slow_answer_is_read_to_its_end() -> None:
    """Silence is bounded, and the time for all of a network of 90 MB is not."""
    body = os.urandom(800)
    slow = Trickle(body, parts=8, pause=0.5)
    try:
        store = BucketStore("s3://topwork", slow.options, Patience(silence=2.0))
        assert store.read("acme", UID, Artifact.describe(body)) == body
    finally:
        slow.close()


def test_an_answer_that_stops_in_its_middle_is_none() -> None:
    body = os.urandom(800)
    stuck = Trickle(body, parts=2, pause=0.0, whole=False)
    try:
        store = BucketStore("s3://topwork", stuck.options, Patience(silence=1.0))
        begun = time.monotonic()
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                store.read("acme", UID, Artifact.describe(body))
        assert time.monotonic() - begun < 15.0
        assert not store.available
    finally:
        stuck.close()


def test_an_upload_may_last_as_long_as_its_size_asks_for(
    process: BucketProcess, impatient: BucketStore
) -> None:
    """A bucket that reads slowly is no bucket that hangs."""
    patient = BucketStore(process.url, process.options, Patience(silence=2.0, megabyte=10.0))
    process.hang()
    timer = threading.Timer(3.0, process.resume)
    timer.start()
    begun = time.monotonic()
    data = os.urandom(1_000_000)
    kept = patient.publish("acme", UID, data)
    assert time.monotonic() - begun > 2.0
    timer.join()
    assert patient.read("acme", UID, kept) == data


def test_a_breaker_counts_calls_in_a_row_and_no_old_ones() -> None:
    alive = threading.Event()
    breaker = Breaker(alive.is_set, pause=0.01)
    old = breaker.begin()
    breaker.unanswered(breaker.begin())
    breaker.answered()
    # Begun before the answer.
    breaker.unanswered(old)
    breaker.unanswered(breaker.begin())
    breaker.begin()
    breaker.unanswered(breaker.begin())
    with pytest.raises(StoreUnavailable):
        breaker.begin()
    alive.set()
    until(lambda: not breaker.is_open, seconds=10)
    breaker.unanswered(breaker.begin())
    assert not breaker.is_open
