"""The fitting process: answers, errors, and what happens when it dies."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters.probe.fit import OneLabel, ProbeConfig, TooCostly, expected_seconds, fit
from adapters.probe.label_names import names_of_texts
from adapters.processes import fit_queue
from adapters.processes.errors import FitterOverloaded, FitterUnavailable
from adapters.processes.fit_client import Fitter
from adapters.processes.fit_process import FitProcess
from tests.support.conditions import eventually
from tests.support.models.synthetic_embeddings import classification, clouds, dataset
from tests.support.processes import stop

pytestmark = pytest.mark.anyio


@pytest.fixture
async def fitter() -> AsyncIterator[Fitter]:
    fitter = Fitter(max_queue=3)
    await fitter.start()
    yield fitter
    await fitter.close()


def pid_of(fitter: Fitter, line: int) -> int | None:
    process = fitter._queues[line].process
    return None if process is None else process.pid


def child_of(fitter: Fitter) -> int:
    pid = pid_of(fitter, 0)
    assert pid is not None
    return pid


async def test_fits_as_the_function_does_in_a_niced_process(fitter: Fitter) -> None:
    data = classification(100, 24, 3)
    fitted = await fitter.fit(data)
    assert fitted.head.to_bytes() == fit(data).head.to_bytes()
    assert fitted.report["accuracy"] == fit(data).report["accuracy"]
    assert os.getpriority(os.PRIO_PROCESS, child_of(fitter)) >= 10
    assert fitter.alive
    assert fitter.queued == 0


async def test_names_and_costs_of_labels_reach_the_fit(fitter: Fitter) -> None:
    data = classification(40, 24, 3)
    labels = sorted({str(target) for target in data.targets})
    directions = {label: clouds(1, 24, 1)[0][0] + row for row, label in enumerate([*labels, "a name alone"])}
    named = replace(data, names=names_of_texts(directions, data.embeddings.mean(axis=0)))
    config = ProbeConfig(costs={labels[0]: 10.0})
    fitted = await fitter.fit(named, config)
    assert fitted.head.to_bytes() == fit(named, config).head.to_bytes()
    assert fitted.head.labels == tuple(sorted([*labels, "a name alone"]))
    nothing = replace(
        named,
        embeddings=data.embeddings[:0],
        targets=[],
        digests=[],
        groups=(),
        sampled=(),
        names=named.names,
    )
    fitted = await fitter.fit(nothing, config)
    assert fitted.head.to_bytes() == fit(nothing, config).head.to_bytes()
    assert len(fitted.scores) == 0


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
    stop(killed)
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
        process = fitter._queues[0].process
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
    stop(child_of(fitter))
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
    stop(child_of(fitter))
    running = asyncio.create_task(fitter.fit(dataset(rows, ["a", "b"] * 10_000)))
    turns = 0
    while turns < 50:
        await asyncio.sleep(0.01)
        turns += 1
    os.kill(child_of(fitter), signal.SIGCONT)
    assert len((await running).head.labels) == 2


async def test_what_is_refused_does_not_wait(fitter: Fitter) -> None:
    stop(child_of(fitter))
    with pytest.raises(TooCostly):
        await fitter.fit(classification(400, 64, 4), ProbeConfig(limit_seconds=1e-3))
    with pytest.raises(OneLabel):
        await fitter.fit(dataset(clouds(10_000, 8, 2)[0], ["a"] * 10_000))
    os.kill(child_of(fitter), signal.SIGCONT)


async def test_tenants_take_turns(fitter: Fitter) -> None:
    ended: list[str] = []

    async def ask(tenant: str) -> None:
        await fitter.fit(classification(200, 24, 4), tenant=tenant)
        ended.append(tenant)

    stop(child_of(fitter))
    asked = [asyncio.create_task(ask("many")) for _ in range(3)]
    await asyncio.sleep(0.1)
    asked.append(asyncio.create_task(ask("one")))
    await asyncio.sleep(0.1)
    os.kill(child_of(fitter), signal.SIGCONT)
    await asyncio.gather(*asked)
    assert ended == ["many", "one", "many", "many"]


async def test_a_tenant_that_fills_the_queue_is_refused_itself(fitter: Fitter) -> None:
    data = classification(200, 24, 4)
    stop(child_of(fitter))
    asked = [asyncio.create_task(fitter.fit(data, tenant="many")) for _ in range(3)]
    await asyncio.sleep(0.1)
    asked += [asyncio.create_task(fitter.fit(data, tenant=tenant)) for tenant in ("one", "other")]
    await asyncio.sleep(0.1)
    for tenant in ("many", "one", "yet another"):
        with pytest.raises(FitterOverloaded):
            await fitter.fit(data, tenant=tenant)
    assert fitter.queued == 5
    os.kill(child_of(fitter), signal.SIGCONT)
    assert len(await asyncio.gather(*asked)) == 5
    assert fitter.queued == 0


async def test_a_process_that_cannot_be_started_is_tried_again(
    fitter: Fitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(niceness: int) -> FitProcess:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    died = child_of(fitter)
    with monkeypatch.context() as patch:
        patch.setattr(fit_queue, "_PAUSE_SECONDS", 0.1)
        patch.setattr(fit_queue, "FitProcess", refused)
        os.kill(died, signal.SIGKILL)
        await eventually(lambda: not fitter.alive)
        with pytest.raises(FitterUnavailable):
            await fitter.fit(classification(60, 8, 2))
        assert fitter.replaced == 0
    await eventually(lambda: fitter.alive and child_of(fitter) != died)
    assert fitter.replaced == 1


@pytest.fixture
async def lines() -> AsyncIterator[Fitter]:
    fitter = Fitter(8, (0.25, 2.0, math.inf), idle_seconds=1.0)
    await fitter.start()
    yield fitter
    await fitter.close()


async def test_long_fits_of_one_tenant_do_not_hold_the_short_ones_of_another(lines: Fitter) -> None:
    long, middle, short = (
        classification(1_000, 384, 400),
        classification(2_000, 384, 60),
        classification(60, 24, 3),
    )
    assert [expected_seconds(one) > bound for one, bound in ((long, 2.0), (middle, 0.25))] == [True, True]
    assert expected_seconds(middle) < 2.0
    asked = [asyncio.create_task(lines.fit(long, tenant="many")) for _ in range(5)]
    await asyncio.sleep(0)
    for _ in range(10):
        fitted = await lines.fit(short, tenant="one")
    assert not any(task.done() for task in asked[1:])
    assert fitted.head.to_bytes() == fit(short).head.to_bytes()
    fitted = await lines.fit(middle, tenant="one")
    assert not all(task.done() for task in asked)
    priorities = [os.getpriority(os.PRIO_PROCESS, line.process.pid) for line in lines._queues if line.process]
    assert priorities == sorted(set(priorities))
    for task in asked:
        task.cancel()
    # As one process fits all of them.
    alone = Fitter()
    await alone.start()
    assert (await alone.fit(middle)).head.to_bytes() == fitted.head.to_bytes()
    await alone.close()


async def test_a_process_that_is_not_needed_any_more_ends(lines: Fitter) -> None:
    data = classification(2_000, 384, 60)
    ended: set[int] = set()
    for _ in range(2):
        await lines.fit(data)
        pid = pid_of(lines, 1)
        assert pid is not None
        await eventually(lambda: pid_of(lines, 1) is None)
        await eventually(lambda gone=pid: not Path(f"/proc/{gone}").exists())  # type: ignore[misc]
        ended.add(pid)
    assert len(ended) == 2
    assert lines.alive
    assert lines.replaced == 0


async def test_a_long_fit_whose_process_is_killed_is_repeated(lines: Fitter) -> None:
    running = asyncio.create_task(lines.fit(classification(2_000, 384, 60)))
    await eventually(lambda: not lines._queues[1].broken)
    pid = pid_of(lines, 1)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert len((await running).head.labels) == 60
    assert lines.replaced == 1


async def test_the_process_ends_when_its_input_does() -> None:
    """The fitting process ends when the serving process is killed."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "adapters.processes.fit_server",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    await child.stdout.read(1)
    child.stdin.close()
    assert await asyncio.wait_for(child.wait(), 10) == 0
