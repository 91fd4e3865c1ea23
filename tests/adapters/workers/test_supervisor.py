"""When the worker is started again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from adapters.workers import supervisor
from adapters.workers.supervisor import WorkerSupervisor
from service.settings import Settings
from tests.support.conditions import eventually


@pytest.mark.anyio
async def test_a_worker_that_ends_is_not_replaced_after_the_supervisor_is_told_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    async def run(self: WorkerSupervisor) -> int:
        started.append(self)
        return 1

    monkeypatch.setattr(WorkerSupervisor, "_run", run)
    monkeypatch.setattr(supervisor, "_FIRST_PAUSE", 0.1)
    monkeypatch.setattr(supervisor, "_LONGEST_PAUSE", 0.1)
    workers = WorkerSupervisor(Settings(home=tmp_path).worker)
    await workers.start()
    await eventually(lambda: len(started) == 2)
    # The worker has ended, and the supervisor pauses before it starts the next one.
    workers.end()
    await asyncio.sleep(0.3)
    assert len(started) == 2
    assert not workers.alive
    await workers.close()
