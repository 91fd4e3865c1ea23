"""The threads for what blocks: tenants take turns, and one that asks for much leaves some to others."""

from __future__ import annotations

import asyncio
import threading
import time
from contextvars import copy_context

import pytest

from adapters.threads import DATABASE, KEYS, POLL, STORE, TENANT, FairThreads


def ask(threads: FairThreads, tenant: str, work: object) -> object:
    def submit() -> object:
        TENANT.set(tenant)
        return threads.submit(work)  # type: ignore[arg-type]

    return copy_context().run(submit)


def test_who_asks_for_little_does_not_wait_behind_who_asks_for_much() -> None:
    threads, done, go = FairThreads(3), [], threading.Event()

    def work(tenant: str, number: int) -> None:
        go.wait(10)
        done.append(f"{tenant}{number}")

    ask(threads, "other", lambda: None).result(10)  # type: ignore[attr-defined]
    futures = [ask(threads, "much", lambda number=number: work("much", number)) for number in range(20)]
    futures += [ask(threads, "little", lambda number=number: work("little", number)) for number in range(2)]
    go.set()
    for future in futures:
        future.result(10)  # type: ignore[attr-defined]
    # The first tenant has one of three threads while others ask.
    assert done.index("little0") <= 4
    assert done.index("little1") <= 8
    assert [one for one in done if one.startswith("much")] == [f"much{number}" for number in range(20)]
    threads.shutdown()


def test_a_tenant_alone_has_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.threads._ALONE_SECONDS", 0.05)
    threads, together = FairThreads(3), threading.Barrier(3)
    ask(threads, "other", lambda: None).result(10)  # type: ignore[attr-defined]
    time.sleep(0.1)
    # The service's own work is no other tenant's.
    ask(threads, "", lambda: None).result(10)  # type: ignore[attr-defined]
    waits = [ask(threads, "one", lambda: together.wait(10)) for _ in range(3)]
    assert sorted(wait.result(10) for wait in waits) == [0, 1, 2]  # type: ignore[attr-defined]
    threads.shutdown()


def test_results_and_errors_and_cancelled_work_are_an_executor_s() -> None:
    threads, go = FairThreads(1), threading.Event()
    blocked = threads.submit(go.wait, 10)
    cancelled, failing = threads.submit(int), threads.submit(int, "no number")
    assert cancelled.cancel()
    go.set()
    assert blocked.result(10)
    with pytest.raises(ValueError, match="no number"):
        failing.result(10)
    assert threads.submit(int, "7").result(10) == 7
    threads.shutdown()


@pytest.mark.anyio
async def test_an_event_loop_takes_it_for_its_own() -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(FairThreads(2))
    TENANT.set("a")
    assert await asyncio.gather(*(asyncio.to_thread(pow, 2, n) for n in range(50))) == [
        2**n for n in range(50)
    ]
    await loop.shutdown_default_executor()


@pytest.mark.anyio
async def test_a_store_that_hangs_holds_up_nothing_else() -> None:
    go = threading.Event()
    hung = [asyncio.ensure_future(STORE.run(go.wait, 60)) for _ in range(40)]
    try:
        async with asyncio.timeout(10):
            for threads in (DATABASE, KEYS, POLL):
                assert await threads.run(pow, 2, 3) == 8
            assert await asyncio.to_thread(pow, 2, 3) == 8
        assert not any(one.done() for one in hung)
    finally:
        go.set()
    assert all(await asyncio.gather(*hung))


@pytest.mark.anyio
async def test_work_has_its_caller_s_context_and_error() -> None:
    TENANT.set("a")
    assert await DATABASE.run(TENANT.get) == "a"
    with pytest.raises(ValueError, match="no number"):
        await DATABASE.run(int, "no number")
