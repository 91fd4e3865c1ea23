"""The fitting process: answers, errors, and what happens when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import numpy as np
import pytest

from adapters.fitter import Fitter, FitterOverloaded, FitterUnavailable
from adapters.linear_probe import OneLabel, ProbeConfig, TooCostly, fit
from tests.adapters.clouds import classification, clouds, dataset

pytestmark = pytest.mark.anyio


@pytest.fixture
async def fitter() -> AsyncIterator[Fitter]:
    fitter = Fitter(max_queue=3)
    await fitter.start()
    yield fitter
    await fitter.close()


def child_of(fitter: Fitter) -> int:
    assert fitter._process is not None
    return fitter._process.pid


async def test_fits_as_the_function_does_in_a_niced_process(fitter: Fitter) -> None:
    data = classification(100, 24, 3)
    fitted = await fitter.fit(data)
    assert fitted.head.to_bytes() == fit(data).head.to_bytes()
    assert fitted.report["accuracy"] == fit(data).report["accuracy"]
    assert os.getpriority(os.PRIO_PROCESS, child_of(fitter)) >= 10
    assert fitter.alive
    assert fitter.queued == 0


async def test_errors_come_back_as_themselves(fitter: Fitter) -> None:
    rows = clouds(40, 8, 2)[0]
    with pytest.raises(OneLabel):
        await fitter.fit(dataset(rows, ["a"] * 40))
    with pytest.raises(TooCostly) as refused:
        await fitter.fit(classification(400, 64, 4), ProbeConfig(limit_seconds=1e-3))
    assert refused.value.limit_seconds == 1e-3
    assert (await fitter.fit(classification(60, 8, 2))).report["accuracy"] > 0.5


async def test_a_fit_whose_process_is_killed_is_repeated(fitter: Fitter) -> None:
    killed = child_of(fitter)
    os.kill(killed, signal.SIGSTOP)
    running = asyncio.create_task(fitter.fit(classification(200, 24, 4)))
    await asyncio.sleep(0.2)
    assert not running.done()
    os.kill(killed, signal.SIGKILL)
    fitted = await running
    assert len(fitted.head.labels) == 4
    assert child_of(fitter) != killed
    assert fitter.alive


async def test_a_fit_that_kills_twice_is_given_up_and_the_next_one_works(fitter: Fitter) -> None:
    running = asyncio.create_task(fitter.fit(classification(10_000, 256, 20, apart=1.0)))
    killed: set[int] = set()
    while not running.done():
        await asyncio.sleep(0.05)
        process = fitter._process
        if process is not None and process.pid not in killed and fitter.alive:
            await asyncio.sleep(0.1)
            if not running.done():
                killed.add(process.pid)
                process.kill()
    with pytest.raises(FitterUnavailable):
        await running
    assert len(killed) == 2
    assert (await fitter.fit(classification(60, 8, 2))).report["accuracy"] > 0.5


async def test_the_queue_is_bounded_and_a_cancelled_caller_leaves_it(fitter: Fitter) -> None:
    data = classification(200, 24, 4)
    os.kill(child_of(fitter), signal.SIGSTOP)
    waiting = [asyncio.create_task(fitter.fit(data)) for _ in range(3)]
    await asyncio.sleep(0.1)
    with pytest.raises(FitterOverloaded) as refused:
        await fitter.fit(data)
    assert refused.value.retry_after >= 1
    for task in waiting[1:]:
        task.cancel()
    os.kill(child_of(fitter), signal.SIGCONT)
    assert (await waiting[0]).report["accuracy"] is not None
    assert (await fitter.fit(classification(60, 8, 2))).report["accuracy"] > 0.5


async def test_what_waits_when_it_closes_is_told() -> None:
    fitter = Fitter()
    await fitter.start()
    large = classification(10_000, 256, 20, apart=1.0)
    waiting = [asyncio.create_task(fitter.fit(large)) for _ in range(2)]
    await asyncio.sleep(0.1)
    child = child_of(fitter)
    await fitter.close()
    for task in waiting:
        with pytest.raises(FitterUnavailable):
            await task
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    with pytest.raises(FitterUnavailable):
        await fitter.fit(large)


async def test_a_large_dataset_passes_while_the_event_loop_goes_on(fitter: Fitter) -> None:
    rows = np.random.default_rng(0).standard_normal((20_000, 512)).astype(np.float32)
    running = asyncio.create_task(
        fitter.fit(dataset(rows, ["a", "b"] * 10_000), ProbeConfig(limit_seconds=0.01))
    )
    turns = 0
    while not running.done():
        await asyncio.sleep(0.001)
        turns += 1
    with pytest.raises(TooCostly):
        await running
    assert turns > 5


async def test_the_process_ends_when_its_input_does() -> None:
    """As it does when the serving process is killed: nobody is left to fit for."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "adapters.fitter", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    await child.stdout.read(1)
    child.stdin.close()
    assert await asyncio.wait_for(child.wait(), 10) == 0
