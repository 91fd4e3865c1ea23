"""Work that goes on without its caller: it ends, and only a fault is told of."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from adapters.completion import to_its_end
from adapters.registry.errors import UnknownAdapter


async def leave(error: BaseException | None) -> list[str]:
    """Cancels the caller while the work goes on, which then raises; what the loop says of it."""
    said: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["message"]))
    begun, go, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> str:
        begun.set()
        await go.wait()
        ended.set()
        if error is not None:
            raise error
        return "done"

    caller = asyncio.create_task(to_its_end(work()))
    await begun.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go.set()
    await asyncio.wait_for(ended.wait(), 5)
    await asyncio.sleep(0)
    gc.collect()
    return said


@pytest.mark.anyio
async def test_what_a_client_that_left_would_have_been_told_is_no_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert await leave(None) == []
    assert await leave(UnknownAdapter("films")) == []
    assert not caplog.records


@pytest.mark.anyio
async def test_a_fault_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "topwork"):
        assert await leave(ZeroDivisionError("a fault")) == []
    (record,) = caplog.records
    assert "a fault" in str(record.exc_info)


@pytest.mark.anyio
async def test_who_stays_gets_what_it_gives_or_raises() -> None:
    async def fails() -> None:
        raise UnknownAdapter("films")

    assert await to_its_end(asyncio.sleep(0, "done")) == "done"
    with pytest.raises(UnknownAdapter):
        await to_its_end(fails())
