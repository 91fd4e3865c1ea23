"""Bytes that are no request, or a doubtful one: each is refused, and nothing behind it is answered."""

from __future__ import annotations

import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from benchmarks.harness.service_process import Serving
from tests.faults import times
from tests.faults.inputs.malformed_requests import GOOD, Message, message
from tests.support.service.connections import connected, received, send

ADMIN = "0123456789abcdef0123456789abcdef"
KEY = (b"authorization", b"Bearer " + ADMIN.encode())
MESSAGES = times(20_000, 500)
LONGEST = 10.0
# How long something may be answered, before this side says that it has no more to send.
_PATIENCE = 1.0
_QUIET = 0.02

_LEAK = re.compile(
    rb"Traceback|File \"|site-packages|/(tmp|dev/shm|home|usr)/|\.py\b|\.db\b|sqlite|psycopg|SELECT |INSERT "
)
_STATUS = re.compile(rb"HTTP/1\.1 (\d\d\d)[ \r]")


class OutOfStep(ValueError):
    """The bytes are no sequence of answers."""


def statuses(data: bytes, *, whole: bool = True) -> list[int]:
    """The statuses of the answers in `data`, in a row. whole: the last one is there to its end."""
    found: list[int] = []
    while data:
        match = _STATUS.match(data)
        if match is None:
            raise OutOfStep(f"no status line: {data[:80]!r} after {found}")
        found.append(int(match[1]))
        head, ended, data = data.partition(b"\r\n\r\n")
        try:
            data = _behind_body(head.lower(), data, found[-1])
        except OutOfStep:
            if whole:
                raise
            break
        if whole and not ended:
            raise OutOfStep("an answer's head does not end")
    return found


def _behind_body(head: bytes, data: bytes, status: int) -> bytes:
    if status < 200 or status in (204, 304):
        return data
    length = re.search(rb"\r\ncontent-length: *(\d+)", head)
    if length is not None:
        if len(data) < int(length[1]):
            raise OutOfStep("an answer is shorter than it says")
        return data[int(length[1]) :]
    if b"transfer-encoding: chunked" not in head:
        raise OutOfStep("an answer has no length")
    while True:
        size, found, data = data.partition(b"\r\n")
        if not found:
            raise OutOfStep("a chunk is missing")
        data = data[int(size, 16) + 2 :]
        if int(size, 16) == 0:
            return data


@dataclass(slots=True)
class Told:
    """The answer to a message, and the seconds until the service closed. reset: the connection broke."""

    data: bytes = b""
    seconds: float = 0.0
    reset: bool = False


def tell(url: str, bad: Message) -> Told:
    """Sends the message; once it is answered, or nothing comes, ends this side and waits for the other."""
    place = urlsplit(url)
    told = Told()
    with socket.create_connection((place.hostname, place.port), timeout=LONGEST) as connection:
        try:
            connection.sendall(bad.data)
            begun = time.monotonic()
            _listen(connection, told, 0.0 if bad.cut else _PATIENCE)
            connection.shutdown(socket.SHUT_WR)
            begun = time.monotonic()
            _listen(connection, told, LONGEST + 1, to_end=True)
        except OSError:
            told.reset = True
        told.seconds = time.monotonic() - begun
    return told


def _listen(connection: socket.socket, told: Told, patience: float, *, to_end: bool = False) -> None:
    until = time.monotonic() + patience
    while (left := until - time.monotonic()) > 0:
        connection.settimeout(min(left, _QUIET) if told.data and not to_end else left)
        try:
            piece = connection.recv(65_536)
        except TimeoutError:
            if told.data and not to_end:
                return
            continue
        if not piece:
            return
        told.data += piece


def wrong(bad: Message, told: Told) -> str | None:
    """The faults of the answer to a message."""
    if told.seconds > LONGEST:
        return f"nothing for {told.seconds:.0f} s"
    # A client that sends after the server has closed may lose an answer on its way.
    try:
        found = statuses(told.data, whole=not told.reset)
    except OutOfStep as error:
        return str(error)
    if any(status >= 500 for status in found):
        return f"answered {found}: {told.data[:300]!r}"
    if leak := _LEAK.search(told.data):
        return f"tells of the inside: {told.data[max(0, leak.start() - 50) : leak.end() + 50]!r}"
    final = [status for status in found if status >= 200]
    if bad.doubtful and (b"smuggled" in told.data or len(final) > 1):
        return f"what is behind it is answered: {final} {told.data[-300:]!r}"
    return None


def works(url: str) -> bool:
    """True if a good request is answered."""
    with connected(url) as connection:
        send(connection, [GOOD.replace(b"\r\n\r\n", b"\r\n%s: %s\r\nconnection: close\r\n\r\n" % KEY)])
        return received(connection).startswith(b"HTTP/1.1 200 ")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service that asks for keys: it has to think of no Host."""
    environment = {"TOPWORK_ADMIN_KEY": ADMIN, "TOPWORK_BACKBONES": "minilm-l6-v2", "TOPWORK_WORKERS": "0"}
    with Serving(tmp_path_factory.mktemp("guarded"), environment=environment) as serving:
        yield serving


def test_what_is_no_request_is_refused(serving: Serving, guarded: Serving) -> None:
    kinds: Counter[str] = Counter()

    def one(number: int) -> str | None:
        asks_for_key = number % 2 == 1
        url = (guarded if asks_for_key else serving).url
        bad = message(number, (KEY,) if asks_for_key and number % 3 else ())
        kinds[bad.kind.split(" ")[0]] += 1
        found = wrong(bad, tell(url, bad))
        if found is None and number % 100 < 2 and not works(url):
            found = "a good request behind it is not answered"
        return found and f"{number} {bad.kind}: {found}\n  sent {bad.data[:400]!r}"

    with ThreadPoolExecutor(8) as pool:
        failures = [found for found in pool.map(one, range(MESSAGES)) if found]
    assert not failures, f"{len(failures)} of {MESSAGES}\n" + "\n".join(failures[:20])
    assert min(kinds.values()) >= MESSAGES // 40, kinds
    for running in (serving, guarded):
        assert running.process.poll() is None
        assert works(running.url)
        assert "Traceback" not in running.log.read_text(errors="replace")


def test_the_checks_see_what_is_wrong() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
    assert statuses(answer + answer) == [200, 200]
    for data in (answer + b"more", answer[:-1], b"hello"):
        with pytest.raises(OutOfStep):
            statuses(data)
    assert statuses(answer[:-1], whole=False) == [200]
    doubtful = Message("frame", b"", doubtful=True)
    assert wrong(doubtful, Told(answer)) is None
    assert wrong(doubtful, Told(answer + answer)) is not None
    assert wrong(doubtful, Told(answer.replace(b"200", b"502"))) is not None
    assert wrong(doubtful, Told(answer, seconds=11.0)) is not None
    leaking = answer.replace(b": 2", b": 10").replace(b"hi", b"/tmp/x.txt")
    assert wrong(Message("field", b""), Told(leaking)) is not None
