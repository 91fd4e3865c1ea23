"""Signs of life of real processes: beating, stopped, and busy without beating."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from adapters.processes import heartbeat
from adapters.processes.fit_client import Fitter
from adapters.processes.heartbeat import HeartbeatMonitor, ProgressClock
from tests.support.models.synthetic_embeddings import classification
from tests.support.processes import stop


@contextmanager
def process(program: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        try:
            yield child
        finally:
            child.kill()


SLEEPING = "import time; print(flush=True); time.sleep(60)"
COMPUTING = "print(flush=True)\nwhile True: pass"


@pytest.mark.parametrize(("program", "dead"), [(SLEEPING, True), (COMPUTING, False)])
def test_silence_without_cpu_time_is_death(program: str, dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_SILENT_SECONDS", 0.5)
    monkeypatch.setattr(heartbeat, "_LONGEST_SECONDS", 1.5)
    with process(program) as child:
        pulse = HeartbeatMonitor(child.pid)
        looks = []
        for _ in range(20):
            looks.append(pulse.look())
            time.sleep(0.1)
        first = next(number for number, silent in enumerate(looks) if silent is not None)
        assert looks[first] == pytest.approx(0.5 if dead else 1.5, abs=0.3)
        pulse.beat()
        assert pulse.look() is None


def test_who_was_stopped_as_well_does_not_take_the_child_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "_SILENT_SECONDS", 0.5)
    with process(SLEEPING) as child:
        pulse = HeartbeatMonitor(child.pid)
        assert pulse.look() is None
        time.sleep(1.0)
        assert pulse.look() is None


def test_headway_is_idleness_or_work_and_not_waiting() -> None:
    found: list[bool] = []
    asked, waited, done, seen = (threading.Event() for _ in range(4))

    def work() -> None:
        headway = ProgressClock()
        ways.append(headway)
        asked.set()
        waited.wait(10)
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            pass
        done.set()
        seen.wait(10)

    ways: list[ProgressClock] = []
    thread = threading.Thread(target=work)
    thread.start()
    assert asked.wait(10)
    time.sleep(0.1)
    headway = ways[0]
    found += [headway.made(), headway.made()]
    headway.idle = False
    found.append(headway.made())
    waited.set()
    assert done.wait(10)
    found.append(headway.made())
    seen.set()
    thread.join()
    assert found == [True, True, False, True]


@pytest.mark.anyio
async def test_a_stopped_fit_is_noticed_and_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_SILENT_SECONDS", 2.5)
    fitter = Fitter()
    await fitter.start()
    try:
        assert fitter._queues[0].process is not None
        stopped = fitter._queues[0].process.pid
        stop(stopped)
        begun = time.monotonic()
        fitted = await fitter.fit(classification(200, 24, 4))
        assert len(fitted.head.labels) == 4
        assert time.monotonic() - begun < 15.0
        assert fitter._queues[0].process.pid != stopped
        assert fitter.replaced == 1
        # Another process starts without a request.
        fitter._queues[0].process.kill()
        deadline = time.monotonic() + 15.0
        while fitter.replaced < 2 or not fitter.alive:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
    finally:
        await fitter.close()


@pytest.mark.anyio
async def test_a_fit_for_nobody_is_not_begun_by_a_new_process() -> None:
    fitter = Fitter()
    await fitter.start()
    try:
        assert fitter._queues[0].process is not None
        stop(fitter._queues[0].process.pid)
        caller = asyncio.create_task(fitter.fit(classification(10_000, 256, 20, apart=1.0)))
        await asyncio.sleep(0.2)
        caller.cancel()
        fitter._queues[0].process.kill()
        begun = time.monotonic()
        # The other one would take seconds.
        await fitter.fit(classification(60, 8, 2))
        assert fitter.replaced == 1
        assert time.monotonic() - begun < 5.0
    finally:
        await fitter.close()
