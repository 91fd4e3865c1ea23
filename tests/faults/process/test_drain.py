"""SIGTERM under load: requests on accepted connections are answered."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.harness.service_process import Serving
from tests.faults import times
from tests.support.models import tiny_backbones
from tests.support.service.calls import get
from tests.support.service.client import Caller
from tests.support.service.commands import bentoml_serve
from tests.support.service.faulty_service import environment
from tests.support.service.load_callers import Loop, post, total

BODY = b'{"adapter": "drained", "inputs": [{"text": "some words of no meaning"}]}'


@contextmanager
def plain(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with Serving(folder / "home", environment=environment(folder)) as running:
        yield running.url, running.process


@contextmanager
def supervised(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    arguments = ("--host", "127.0.0.1", "--port", str(port))
    # The pipe of its log is not read meanwhile.
    quiet = {"TOPWORK_ACCESS_LOG": "false"}
    process = bentoml_serve(folder / "home", *arguments, **environment(folder), **quiet)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            try:
                if get(f"{url}/readyz")[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        yield url, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("_", range(times(50, 1)))
@pytest.mark.parametrize("way", [plain, supervised], ids=["topwork", "bentoml"])
def test_sigterm_under_load_drops_nothing(tmp_path: Path, way: object, _: int) -> None:
    assert callable(way)
    with way(tmp_path) as (url, process):
        caller = Caller(url, "default")
        with caller.http:
            examples = [{"text": tiny_backbones.sentence(n), "label": "ab"[n % 2]} for n in range(8)]
            caller.adapt("drained", examples)
        loops = [
            Loop(url, post("/predict", BODY, close=not keep_alive), keep_alive)
            for keep_alive in [True] * 8 + [False] * 4
        ]
        time.sleep(1.5)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for loop in loops:
            loop.join()
        assert process.wait(30) == 0
        assert time.monotonic() - begun < 30.0
    found = total(loops)
    assert set(found) <= {"200", "reset"}, found
    assert found["200"] > 100
    # A client that connects in the last instant may be refused; it is refused again when it tries again.
    assert all(loop.found["reset"] <= 1 for loop in loops)
    assert all(loop.refused for loop in loops)
