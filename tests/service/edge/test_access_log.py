"""A line for each request."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.settings import Settings
from tests.support.service.edge_app import Shell


class Lines(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


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
async def test_no_line_is_lost_when_the_service_stops(lines: Lines, tmp_path: Path) -> None:
    shell = Shell(Settings(home=tmp_path))
    async with shell.client() as client:
        for number in range(20):
            await client.get(f"/things/{number}")
        shell.edge.close()
    said = [record.getMessage().split()[:3] for record in lines.records]
    assert said == [["GET", f"/things/{number}", "200"] for number in range(20)]
