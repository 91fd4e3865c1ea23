"""Streams of a job's events: how many may be open, and that they end with the service."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from benchmarks.harness.service_process import Serving
from tests.support.service.client import BLAME, PRAISE, Caller, Json

OF_A_TENANT, OF_ALL = 10, 50
# Without workers each job stays queued.
SETTINGS = {"TOPWORK_BACKBONES": "minilm-l6-v2", "TOPWORK_WORKERS": "0"}
CSV = {"Content-Type": "text/csv"}


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("idle"), environment=SETTINGS) as running:
        yield running


def table() -> bytes:
    rows = [(text, "good") for text in PRAISE] + [(text, "bad") for text in BLAME]
    return ("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows)).encode()


def queue(caller: Caller, content: bytes = table()) -> Json:
    """The job of an upload."""
    return caller.call("POST", "/adapt?adapter=films", 202, content=content, headers=CSV)


def open_stream(caller: Caller, job: Json, stack: ExitStack) -> httpx.Response:
    """The answer; of a stream that opens, once its first event is there. It is open as long as the stack."""
    answer = stack.enter_context(caller.http.stream("GET", f"/jobs/{job['id']}/events"))
    if answer.status_code == 200:
        lines = answer.iter_lines()
        assert next(lines) == "event: queued"
        # httpx closes an answer whose iterator has no reference.
        answer.extensions["lines"] = lines
    else:
        answer.read()
    return answer


def test_the_streams_of_a_tenant_are_bounded_and_closed_ones_do_not_count(idle: Serving) -> None:
    caller = Caller(idle.url)
    with caller.http, ExitStack() as streams:
        job = queue(caller)
        for _ in range(OF_A_TENANT + 1):
            assert caller.code("GET", f"/jobs/{'0' * 32}/events", 404) == "unknown_job"
        with ExitStack() as one:
            assert open_stream(caller, job, one).status_code == 200
            for _ in range(OF_A_TENANT - 1):
                assert open_stream(caller, job, streams).status_code == 200
            refused = open_stream(caller, job, streams)
            assert refused.status_code == 429
            assert refused.json()["code"] == "too_many_streams"
            assert int(refused.headers["retry-after"]) > 0
        until_open(caller, job, streams)


def test_the_streams_of_all_tenants_are_bounded(idle: Serving) -> None:
    """Half of them are for all who ask, and of the other half every tenant gets one."""
    callers = [Caller(idle.url) for _ in range(3 + OF_ALL // 2 + 1)]
    with ExitStack() as streams:
        for caller in callers:
            streams.enter_context(caller.http)
        jobs = [queue(caller) for caller in callers]
        few = zip(callers, jobs, (OF_A_TENANT, OF_A_TENANT, OF_ALL // 2 - 2 * OF_A_TENANT), strict=False)
        for caller, job, count in few:
            for _ in range(count):
                until_open(caller, job, streams)
        assert open_stream(callers[2], jobs[2], streams).status_code == 429
        for caller, job in zip(callers[3:-1], jobs[3:-1], strict=True):
            until_open(caller, job, streams)
        assert open_stream(callers[3], jobs[3], streams).status_code == 429
        assert open_stream(callers[-1], jobs[-1], streams).status_code == 429
        assert callers[-1].call("GET", f"/jobs/{jobs[-1]['id']}")["state"] == "queued"


def until_open(caller: Caller, job: Json, stack: ExitStack) -> None:
    """Opens a stream as soon as the service knows that another one is closed."""
    end = time.monotonic() + 10.0
    while open_stream(caller, job, stack).status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_an_open_stream_ends_with_the_service_and_does_not_hold_it_up(
    tmp_path: Path, sign: signal.Signals
) -> None:
    running = Serving(tmp_path, environment=SETTINGS)
    caller = Caller(running.url)
    with caller.http, ExitStack() as stack:
        streams = [open_stream(caller, queue(caller), stack) for _ in range(2)]
        begun = time.monotonic()
        running.process.send_signal(sign)
        for stream in streams:
            # httpx raises unless the stream is complete.
            for _ in stream.extensions["lines"]:
                pass
        assert time.monotonic() - begun < 1.5
        assert running.process.wait(30) == 0
        # The drain timeout is 20 seconds.
        assert time.monotonic() - begun < 10.0
    assert running.group() == []


def test_what_is_wrong_with_each_line_is_told_by_the_job_alone(caller: Caller) -> None:
    job = queue(caller, table() + b"only one column\n")
    end = time.monotonic() + 120.0
    while job["finished_at"] is None:
        assert time.monotonic() < end
        time.sleep(0.2)
        job = caller.call("GET", f"/jobs/{job['id']}")
    assert [one["code"] for one in job["progress"]["errors"]] == ["invalid_line"]
    (listed,) = caller.call("GET", "/jobs")["jobs"]
    with caller.http.stream("GET", f"/jobs/{job['id']}/events") as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    told = json.loads(lines[-1].removeprefix("data: "))
    assert job["progress"].pop("errors")
    assert listed == told == job
