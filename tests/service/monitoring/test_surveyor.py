"""Plans in doubt are measured again while nothing else happens, and give way at once to who asks."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.cache.networks import NetworkPool
from adapters.storage.open import open_store
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.runtime.autotune import ExecutionPlan, MeasuredPlan, keep_plan
from models.survey import known_plan
from service.monitoring.backbone_monitor import BackboneMonitor
from service.monitoring.surveyor import Schedule, Surveyor
from tests.support.models import tiny_backbones
from tests.support.service.commands import run_topwork

pytestmark = pytest.mark.anyio

NAME = tiny_backbones.TEXT_NAME
DOUBTFUL = MeasuredPlan(ExecutionPlan(alone=1, workers=2, beside=1, batch=8), others=0.9, spread=0.3)
BETTER = MeasuredPlan(ExecutionPlan(alone=2, workers=2, beside=1, batch=16), others=0.01, spread=0.02)
SCHEDULE = Schedule(idle=0.1, look=0.01, again=0.1, most=0.2)


def printing(measured: MeasuredPlan, log: Path) -> Callable[[str], list[str]]:
    """A process that tells so, and leaves a line in the log when it begins."""
    code = f"open({str(log)!r}, 'a').write('x\\n'); print({json.dumps(asdict(measured))!r})"
    return lambda name: [sys.executable, "-c", code]


def hanging(log: Path) -> Callable[[str], list[str]]:
    """A process that measures for ever, once it has left its number."""
    code = f"import os, time; open({str(log)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(600)"
    return lambda name: [sys.executable, "-c", code]


class Reopening:
    """Opens the backbone again, with the plan of the moment in which it is asked to, once it may go on."""

    def __init__(self, export: Path, known: dict[str, MeasuredPlan]) -> None:
        self.asked = threading.Event()
        self.going = threading.Event()
        self.going.set()
        self._export = export
        self._known = known

    def __call__(self, name: str) -> Backbone:
        plan = self._known[name].plan
        self.asked.set()
        assert self.going.wait(30)
        return Backbone.open(self._export, plan=plan)


@dataclass(frozen=True)
class Served:
    """One tiny backbone, watched and surveyed."""

    batchers: dict[str, Batcher]
    surveyor: Surveyor
    monitor: BackboneMonitor
    reopening: Reopening

    async def until(self, true: Callable[[], bool], most: float = 30.0) -> None:
        begun = time.monotonic()
        while not true():
            assert time.monotonic() - begun < most
            await asyncio.sleep(0.01)


@asynccontextmanager
async def served(folder: Path, measured: MeasuredPlan, **options: Any) -> AsyncIterator[Served]:
    export = tiny_backbones.text_export(folder)
    known = {NAME: measured}

    reopen = Reopening(export, known)

    def batcher_for(backbone: Backbone) -> Batcher:
        return Batcher(backbone, max_queue=1_000, workers=backbone.plan.workers)

    def end(why: str) -> Any:
        raise AssertionError(why)

    batchers = {NAME: batcher_for(reopen(NAME))}
    await batchers[NAME].start()
    networks = NetworkPool(open_store(str(folder / "store"), {}), 0, batcher_for)
    monitor = BackboneMonitor(batchers, networks, reopen, batcher_for, end)
    await monitor.start()
    surveyor = Surveyor(known, batchers, networks, monitor.exchange, schedule=SCHEDULE, **options)
    await surveyor.start()
    try:
        yield Served(batchers, surveyor, monitor, reopen)
    finally:
        reopen.going.set()
        await surveyor.close()
        await monitor.close()
        await networks.close()
        await batchers[NAME].close()


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


async def test_a_quiet_measurement_takes_the_place_of_a_doubtful_one(tmp_path: Path) -> None:
    """Requests on their way to the batcher that is exchanged are answered, and others by the new one."""
    log = tmp_path / "log"
    command = printing(BETTER, log)
    async with served(tmp_path, DOUBTFUL, quiet=lambda seconds: True, command=command) as here:
        before = here.batchers[NAME]
        expected = (await before.embed(["ba"])).embeddings
        await here.until(lambda: here.batchers[NAME] is not before)
        now = here.batchers[NAME]
        assert now.backbone.plan == BETTER.plan
        assert here.surveyor.measured[NAME] == BETTER
        for batcher in (before, now):
            assert abs((await batcher.embed(["ba"])).embeddings - expected).max() < 1e-5
        # A confirmed plan is not measured again.
        await asyncio.sleep(0.5)
        assert len(lines(log)) == 1


async def test_a_plan_found_during_a_reopening_is_used(tmp_path: Path) -> None:
    """The reopening has read the plan before, so the exchange comes after it."""
    async with served(tmp_path, DOUBTFUL, quiet=lambda seconds: False) as here:
        here.reopening.asked.clear()
        here.reopening.going.clear()
        here.batchers[NAME].abandon()
        await here.until(here.reopening.asked.is_set)
        here.surveyor.measured[NAME] = BETTER
        exchange = asyncio.create_task(here.monitor.exchange(NAME))
        await asyncio.sleep(0)
        here.reopening.going.set()
        await asyncio.wait_for(exchange, 30)
        assert here.batchers[NAME].backbone.plan == BETTER.plan
        assert (await here.batchers[NAME].embed(["ba"])).errors == {}


async def test_nothing_is_measured_on_a_busy_machine_or_what_is_confirmed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = printing(BETTER, log)
    async with served(tmp_path / "busy", DOUBTFUL, quiet=lambda seconds: False, command=command) as here:
        await asyncio.sleep(1.0)
        assert here.surveyor.measured[NAME] == DOUBTFUL
    async with served(tmp_path / "sure", BETTER, quiet=lambda seconds: True, command=command):
        await asyncio.sleep(0.5)
    assert lines(log) == []


async def test_a_measurement_gives_way_to_a_request_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with served(tmp_path, DOUBTFUL, quiet=lambda seconds: True, command=hanging(log)) as here:
        await here.until(lambda: len(lines(log)) == 1)
        pid = int(lines(log)[0])
        await here.batchers[NAME].embed(["ba"])
        await here.until(lambda: not Path(f"/proc/{pid}").exists(), most=2.0)
        # While requests come, none begins; afterwards another does.
        for _ in range(30):
            await here.batchers[NAME].embed(["ba"])
            await asyncio.sleep(0.03)
        assert len(lines(log)) == 1
        await here.until(lambda: len(lines(log)) == 2)
        assert here.surveyor.measured[NAME] == DOUBTFUL
    await here.until(lambda: not Path(f"/proc/{lines(log)[1]}").exists(), most=2.0)


@pytest.mark.parametrize("told", [BETTER.plan, None])
async def test_what_is_not_better_changes_nothing(tmp_path: Path, told: ExecutionPlan | None) -> None:
    """A measurement that is doubted more, and a process that says nothing."""
    log = tmp_path / "log"
    worse = MeasuredPlan(BETTER.plan, others=0.95, spread=0.3)
    command = printing(worse, log)
    if told is None:
        silent = f"open({str(log)!r}, 'a').write('x\\n')"
        command = lambda name: [sys.executable, "-c", silent]  # noqa: E731
    async with served(tmp_path, DOUBTFUL, quiet=lambda seconds: True, command=command) as here:
        before = here.batchers[NAME]
        await here.until(lambda: len(lines(log)) >= 2)
        assert here.batchers[NAME] is before
        assert here.surveyor.measured[NAME] == DOUBTFUL


async def test_topwork_plan_shows_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as the service does it."""
    home = tmp_path / "bentoml"
    names = tiny_backbones.install(home)
    monkeypatch.setenv("BENTOML_HOME", str(home))
    monkeypatch.setenv("TOPWORK_BACKBONES", ",".join(names))
    monkeypatch.setenv("TOPWORK_THREADS", "2")
    shown = await asyncio.to_thread(run_topwork, tmp_path, "plan")
    assert shown == [{"backbone": name, "plan": None, "confirmed": False} for name in names]
    (measured,) = await asyncio.to_thread(run_topwork, tmp_path, "plan", "--measure", names[1])
    assert measured["backbone"] == names[1]
    (export,) = (path.parent for path in home.rglob("plan.json"))
    kept = known_plan(export, device="cpu", threads=2)
    assert kept is not None
    assert measured["confirmed"] is kept.confirmed
    assert ExecutionPlan(**measured["plan"]) == kept.plan
    usual = ExecutionPlan.usual("text", "cpu", 2)
    keep_plan(export, usual, "cpu", BETTER)
    (image, text) = await asyncio.to_thread(run_topwork, tmp_path, "plan")
    assert image["plan"] is None
    assert text == {"backbone": names[1], **asdict(BETTER), "confirmed": True}
