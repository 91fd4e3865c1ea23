"""A line for each request: late, but with its own time, and none lost when the service stops."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.edge.access_log import AccessLog
from service.settings import Settings
from tests.support.service.edge_app import Shell


class Lines(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    async def wait(self, count: int) -> logging.LogRecord:
        """The last of so many."""
        async with asyncio.timeout(5):
            while len(self.records) < count:  # noqa: ASYNC110 - what is waited for sets no event
                await asyncio.sleep(0.01)
        return self.records[count - 1]


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger, handler = logging.getLogger("topwork.access"), Lines()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.anyio
async def test_a_line_is_late_and_says_when_its_request_was_answered(
    lines: Lines,
) -> None:
    log = AccessLog()
    before = time.time()
    log.add("GET", "/adapters", 200, 0.0123, "abc")
    after = time.time()
    assert not lines.records
    record = await lines.wait(1)
    assert record.getMessage() == "GET /adapters 200 12.3ms abc"
    assert before <= record.created <= after < time.time() - 0.05
    assert record.msecs == pytest.approx(record.created % 1 * 1e3)
    # And the next one after a pause, too.
    log.add("GET", "/adapters", 200, 0.0123, "abd")
    assert (await lines.wait(2)).getMessage().endswith(" abd")


@pytest.mark.anyio
async def test_no_line_is_lost_when_the_service_stops(lines: Lines, tmp_path: Path) -> None:
    shell = Shell(Settings(home=tmp_path))
    async with shell.client() as client:
        for number in range(20):
            await client.get(f"/things/{number}")
        shell.edge.close()
    said = [record.getMessage().split()[:3] for record in lines.records]
    assert said == [["GET", f"/things/{number}", "200"] for number in range(20)]
