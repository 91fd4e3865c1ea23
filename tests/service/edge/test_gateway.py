"""How long uploads may take, how many of them one tenant may have open, and what can be read in two ways."""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import Request

from service.api.routes import post
from service.edge import pace
from service.edge.channel import BodyBudget, RequestChannel
from service.edge.concurrency import UPLOADS_OF_A_TENANT, ConcurrencyLimit
from service.edge.layers import SMALL_BODY
from service.edge.routes import Access, Body, BodyKind
from service.errors import Problem
from service.settings import Settings
from tests.support.service.client import Caller
from tests.support.service.edge_app import Shell

SECONDS = 0.4
CSV = {"Content-Type": "text/csv"}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    async def adapt(request: Request, wait: float = 0.0, work: float = 0.0) -> dict[str, int]:
        await asyncio.sleep(wait)
        received = sum([len(chunk) async for chunk in request.stream()])
        await asyncio.sleep(work)
        return {"bytes": received}

    async def full(request: Request) -> None:
        await request.body()
        raise Problem(429, "full", "Try again later.")

    settings = Settings(home=tmp_path, request_timeout=SECONDS, access_log=False)
    routes = [
        post("/adapt", adapt, "adapt", body=Body("upload")),
        post("/full", full, "predict", body=Body("inputs")),
    ]
    return Shell(settings, routes=routes)


async def pieces(count: int, size: int, pause: float) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size
        await asyncio.sleep(pause)


async def upload(
    shell: Shell, query: str, body: AsyncIterator[bytes], path: str = "/adapt"
) -> httpx.Response:
    async with shell.client(**CSV) as client:
        return await client.post(f"{path}?{query}", content=body)


def code(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, answer.json()["code"]


@pytest.mark.anyio
async def test_an_upload_has_time_as_long_as_bytes_come_and_then_that_of_a_request(shell: Shell) -> None:
    slow = await upload(shell, f"work={0.5 * SECONDS}", pieces(16, 64 << 10, SECONDS / 8))
    assert slow.json() == {"bytes": 16 * (64 << 10)}
    assert code(await upload(shell, "work=60", pieces(1, 64 << 20, 0.0))) == (504, "deadline_exceeded")


@pytest.mark.anyio
async def test_an_upload_that_falls_silent_is_a_408(shell: Shell) -> None:
    begun = time.monotonic()
    answer = await upload(shell, "", pieces(2, 1 << 20, 60.0))
    assert code(answer) == (408, "upload_stalled")
    assert answer.headers["connection"] == "close"
    assert time.monotonic() - begun < SECONDS


@pytest.mark.anyio
async def test_silence_counts_only_while_somebody_listens(shell: Shell) -> None:
    answer = await upload(shell, f"wait={0.6 * SECONDS}", pieces(2, 1000, 0.0))
    assert answer.json() == {"bytes": 2000}


@pytest.mark.anyio
async def test_an_upload_of_drops_and_one_that_waits_too_long_end_all_the_same(shell: Shell) -> None:
    assert code(await upload(shell, "", pieces(1_000, 1, 0.01))) == (504, "deadline_exceeded")
    assert code(await upload(shell, "wait=60", pieces(1, 1, 0.0))) == (504, "deadline_exceeded")


@pytest.mark.anyio
async def test_any_other_body_has_the_time_of_its_request(shell: Shell) -> None:
    answer = await upload(shell, "", pieces(16, 64 << 10, SECONDS / 8), "/streamed")
    assert code(answer) == (504, "deadline_exceeded")


@pytest.mark.anyio
async def test_a_tenant_waits_after_large_requests_in_vain_and_nobody_else_does(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_MS_A_SECOND", 0.5)
    monkeypatch.setattr(pace, "_LONGEST_WAIT", 0.05)

    async def sent(path: str, size: int, tenant: str) -> str:
        async with shell.client() as client:
            answer = await client.post(path, content=b"x" * size, headers={"X-Tenant": tenant})
        return "answered" if answer.is_success else code(answer)[1]

    large, small = 32 << 20, 1 << 10
    for _ in range(3):
        assert await sent("/adapt", large, "eager") == "answered"
        assert await sent("/full", small, "eager") == "full"
    assert await sent("/full", large, "eager") == "full"
    assert await sent("/full", large, "eager") == "overloaded"
    assert await sent("/adapt", large, "eager") == "overloaded"
    assert await sent("/adapt", small, "eager") == "answered"
    assert await sent("/adapt", large, "other") == "answered"
    # Answered requests count too while another tenant asks.
    assert await sent("/adapt", large, "other") == "overloaded"
    assert await sent("/adapt", small, "other") == "answered"


@pytest.mark.anyio
async def test_large_requests_that_wait_go_on_one_after_the_other() -> None:
    now = 0.0
    waits = pace.Pace(lambda: now)
    waits.seen("one")
    assert await waits.wait("one") == 0.0
    waits.settle("one", 0.0, 25_000_000, 0, refused=True)  # 100 ms: what is saved up
    begun = time.monotonic()
    first, second = await asyncio.gather(waits.wait("one"), waits.wait("one"))
    assert first == second == 100.0
    # The second one waits for what the first is expected to cost.
    assert time.monotonic() - begun >= 2.0
    for reserved in (first, second):
        waits.settle("one", reserved, 25_000_000, 0, refused=False)
    assert await waits.wait("other") == 0.0
    now = 2.0
    assert await waits.wait("one") == 0.0


@pytest.mark.anyio
async def test_a_route_reads_as_much_as_the_kind_of_its_body_allows(tmp_path: Path) -> None:
    async def read(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    async def chunks(size: int) -> AsyncIterator[bytes]:
        yield b"x" * size

    kinds: tuple[BodyKind, ...] = ("none", "small", "inputs")
    routes = [post(f"/{kind}", read, "key", body=Body(kind)) for kind in kinds]
    async with Shell(Settings(home=tmp_path, access_log=False), routes=routes).client() as client:
        for kind in kinds:
            assert (await client.post(f"/{kind}", content=b"x" * SMALL_BODY)).json() == {"bytes": SMALL_BODY}
            for content in (b"x" * (SMALL_BODY + 1), chunks(SMALL_BODY + 1)):
                answer = await client.post(f"/{kind}", content=content)
                assert answer.status_code == (200 if kind == "inputs" else 413), kind
                assert kind == "inputs" or code(answer) == (413, "body_too_large")


@pytest.mark.anyio
async def test_what_waited_in_vain_has_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"x" * (20 << 10)}

    async def send(message: object) -> None:
        raise AssertionError("nothing is answered here")

    now = 0.0
    waits = pace.Pace(lambda: now)
    waits.settle("one", 0.0, 100_000_000, 0, refused=True)  # 400 ms, of which 100 are saved up
    scope = {"type": "http", "method": "POST", "path": "/embed"}
    exchange = RequestChannel(
        scope,
        receive,
        send,
        request_id="id",
        headers={},
        access=Access("predict", "inputs"),
        bodies=BodyBudget(1 << 20),
        most=1 << 20,
    )
    exchange.tenant = "one"
    exchange.pace_by(waits)
    with monkeypatch.context() as patched:
        patched.setattr(pace, "_LONGEST_WAIT", 0.01)
        with pytest.raises(Problem) as refused:
            await exchange.receive()
    assert refused.value.code == "overloaded"
    exchange.close()
    now = 5.99
    assert await waits.wait("one") == 400.0


def test_slots_are_counted_for_each_tenant_and_for_all() -> None:
    slots = ConcurrencyLimit("uploads", 3, 2)
    with slots.take("one"), slots.take("one"):
        with pytest.raises(Problem) as refused, slots.take("one"):
            pass
        assert (refused.value.status_code, refused.value.code) == (429, "too_many_uploads")
        with slots.take("two"), pytest.raises(Problem), slots.take("three"):
            pass
        with slots.take("three"):
            pass
    with slots.take("one"):
        pass


def test_a_second_place_is_given_only_while_half_of_all_are_free() -> None:
    slots = ConcurrencyLimit("uploads", 6, 2)
    with ExitStack() as held:
        for tenant in ("one", "one", "two", "three"):
            held.enter_context(slots.take(tenant))
        with pytest.raises(Problem):
            slots.take("two").__enter__()
        for tenant in ("four", "five"):
            held.enter_context(slots.take(tenant))
        with pytest.raises(Problem):
            slots.take("six").__enter__()


@pytest.mark.anyio
async def test_a_place_is_waited_for_but_not_for_long() -> None:
    slots = ConcurrencyLimit("uploads", 1, 1)

    async def hold(tenant: str, until: asyncio.Event) -> None:
        async with slots.wait(tenant, 60.0):
            await until.wait()

    first, second = asyncio.Event(), asyncio.Event()
    holding = asyncio.create_task(hold("one", first))
    waiting = asyncio.create_task(hold("two", second))
    await asyncio.sleep(0.05)
    with pytest.raises(Problem) as refused:
        await slots.wait("three", 0.1).__aenter__()
    assert (refused.value.status_code, refused.value.code) == (429, "too_many_uploads")
    first.set()
    await holding
    second.set()
    await asyncio.wait_for(waiting, 5.0)
    async with slots.wait("three", 0.1):
        pass


def begin_upload(url: str, tenant: str, length: int = 1_000) -> http.client.HTTPConnection:
    """An upload that has sent its first line, and announced more."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.putrequest("POST", "/adapt?adapter=a")
    for name, value in {**CSV, "X-Tenant": tenant, "Content-Length": str(length)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(b"text,label\n")
    return connection


def test_a_tenant_cannot_hold_every_place_for_uploads(caller: Caller, server: str) -> None:
    def attempt(tenant: Caller) -> str:
        # No table: refused at once where it is read at all.
        response = tenant.http.post("/adapt?adapter=a", content=b"one,two\n", headers=CSV)
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) > 0
        return str(response.json()["code"])

    def until(expected: str) -> None:
        end = time.monotonic() + 10.0
        while (found := attempt(caller)) != expected:
            assert time.monotonic() < end, found
            time.sleep(0.02)

    held = [begin_upload(server, caller.tenant) for _ in range(UPLOADS_OF_A_TENANT)]
    try:
        until("too_many_uploads")
        other = Caller(server)
        with other.http:
            assert attempt(other) == "invalid_csv"
    finally:
        for connection in held:
            connection.close()
    until("invalid_csv")


def test_slow_uploads_do_not_delay_those_of_others(caller: Caller, server: str) -> None:
    """Two of each of two tenants, as slowly as is allowed, each beyond what is held of an upload."""
    slow = [begin_upload(server, f"slow-{tenant}", 1 << 30) for tenant in (1, 2) for _ in range(2)]
    over = threading.Event()

    def trickle(connection: http.client.HTTPConnection) -> None:
        connection.send(b"a text that is long,x\n" * 200_000)
        with suppress(OSError):
            while not over.wait(0.5):
                connection.send(b"a text that is long,x\n" * 1_600)

    threads = [threading.Thread(target=trickle, args=(one,), daemon=True) for one in slow]
    for thread in threads:
        thread.start()
    try:
        time.sleep(2.0)
        lines = "".join(f"text {row},{'xy'[row % 2]}\n" for row in range(10))
        begun = time.monotonic()
        answer = caller.http.post(
            "/adapt?adapter=a", content="text,label\n" + lines, headers=CSV, timeout=30.0
        )
        assert answer.status_code == 202, answer.text
        assert time.monotonic() - begun < 10.0
    finally:
        over.set()
        for connection in slow:
            connection.close()
        for thread in threads:
            thread.join()


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/adapt", "/things/a"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Content-Type", ("application/json", "text/csv")),
        ("X-Tenant", ("one", "other")),
        ("X-Tenant", ("same", "same")),
        ("Authorization", ("Bearer a", "Bearer b")),
        ("Host", ("localhost", "evil.example")),
        ("Content-Encoding", ("identity", "gzip")),
    ],
)
async def test_a_header_that_means_one_thing_comes_once(
    shell: Shell, path: str, name: str, values: tuple[str, str]
) -> None:
    """Two media types are refused: one would choose the limits, the other how the body is read."""
    async with shell.client() as client:
        headers = [("Host", "localhost")] * (name != "Host") + [(name, value) for value in values]
        answer = await client.post(path, headers=headers)
        assert code(answer) == (400, "bad_request")
        assert name.lower() in answer.json()["detail"]
        several = [("Host", "localhost"), ("Accept", "a/b"), ("Accept", "c/d")]
        assert (await client.get("/things/a", headers=several)).status_code == 200


@pytest.mark.anyio
async def test_a_request_names_its_host(shell: Shell) -> None:
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": "/things/a",
        "raw_path": b"/things/a",
        "query_string": b"",
        "headers": [],
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await shell.edge(scope, receive, send)
    assert sent[0]["status"] == 400
