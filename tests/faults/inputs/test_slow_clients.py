"""Hundreds of clients that hold connections and do nothing with them, beside those who want answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from service.server.process import raise_descriptor_limit
from tests.faults import times
from tests.support.models import tiny_backbones
from tests.support.service.client import Caller
from tests.support.service.faulty_service import Breaking
from tests.support.service.load_callers import Loop, post, total

SLOW = times(2_000, 200)
# Their answers wait in the service's memory.
UNREADING = times(50, 10)
BODY = json.dumps({"adapter": "beside", "inputs": [{"text": "some words"}]}).encode()
HEAD = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
BUNDLE = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: localhost\r\n\r\n"
KINDS = ("silent", "head", "drops", "stalled")
HELD, UNREAD = times(10, 3), times(20, 6)
CONSTANTS = {
    "service.server.protocol": {"HEAD_SECONDS": HELD, "SILENT_SECONDS": HELD, "UNREAD_SECONDS": UNREAD}
}
# A look or two, and the machine.
CUT_WITHIN = HELD + 6.0


async def slow(url: str, kind: str, found: Counter[str]) -> None:
    """One client, until it is cut off: how is counted."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    begun = time.monotonic()
    first, drop = {
        "silent": (b"", b""),
        "head": (HEAD, b"x"),
        "drops": (HEAD + b"content-length: 100000\r\n\r\n", b" "),
        "stalled": (HEAD + b"content-length: 100000\r\n\r\n" + b" " * 50_000, b""),
    }[kind]
    received = b""
    try:
        writer.write(first)
        while not reader.at_eof():
            writer.write(drop)
            try:
                async with asyncio.timeout(1.0):
                    received += await reader.read(65_536)
            except TimeoutError:
                continue
    except OSError:
        pass
    finally:
        writer.close()
    status = received[9:12].decode() or "nothing"
    in_time = "" if time.monotonic() - begun < CUT_WITHIN else " late"
    found[f"{kind} {status}{in_time}"] += 1


async def unreading(url: str, found: Counter[str]) -> None:
    """Asks for more than the system takes for it, and reads none of it."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1)
    reader.feed_data(b"xxx")
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    begun = time.monotonic()
    try:
        writer.write(BUNDLE * 16)
        while not writer.transport.is_closing() and time.monotonic() - begun < 30.0:
            await asyncio.sleep(1.0)
            writer.write(b"\r\n")
        found["unreading " + ("cut" if writer.transport.is_closing() else "held")] += 1
    except OSError:
        found["unreading cut"] += 1
    finally:
        writer.close()


async def crowd(url: str, found: Counter[str]) -> None:
    tasks = [slow(url, KINDS[number % len(KINDS)], found) for number in range(SLOW - UNREADING)]
    await asyncio.gather(*tasks, *(unreading(url, found) for _ in range(UNREADING)))


def test_healthy_requests_do_not_notice_a_crowd_of_slow_ones(tmp_path: Path) -> None:
    raise_descriptor_limit()
    found: Counter[str] = Counter()
    with Breaking(tmp_path, CONSTANTS) as service:
        caller = Caller(service.url, "default")
        with caller.http:
            caller.adapt(
                "beside", [{"text": tiny_backbones.sentence(n), "label": "ab"[n % 2]} for n in range(8)]
            )
        keep = [Loop(service.url, post("/predict", BODY), True) for _ in range(4)]
        anew = [Loop(service.url, post("/predict", BODY, close=True), False) for _ in range(2)]
        asyncio.run(crowd(service.url, found))
        for loop in (*keep, *anew):
            loop.stop()
        healthy = total([*keep, *anew])
        metrics = Caller(service.url)
        with metrics.http:
            lines = metrics.http.get("/metrics").text.splitlines()
    assert healthy["200"] >= 0.999 * healthy.total(), healthy
    assert healthy.total() > 1_000
    share = (SLOW - UNREADING) // len(KINDS)
    assert found.total() == SLOW
    expected = {"silent nothing", "head 408", "drops 408", "stalled 408", "unreading cut"}
    assert set(found) == expected, found
    assert found["drops 408"] >= share
    cut = {line for line in lines if line.startswith("topwork_connections_cut_total")}
    assert f'topwork_connections_cut_total{{why="silent"}} {float(found["silent nothing"])}' in cut
    assert f'topwork_connections_cut_total{{why="unread"}} {float(UNREADING)}' in cut
