from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from adapters.registry.errors import RegistryUnavailable
from service.monitoring.gauges import Readings, add_gauges
from service.monitoring.metrics import Metrics
from service.settings import Settings
from tests.support.service.edge_app import Shell


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def series(metrics: Metrics) -> set[str]:
    return {
        line.rsplit(" ", 1)[0] for line in metrics.render().decode().splitlines() if not line.startswith("#")
    }


@pytest.mark.anyio
async def test_requests_are_counted_by_template_and_status(tmp_path: Path) -> None:
    shell = Shell(Settings(home=tmp_path, access_log=False))
    async with shell.client() as client:
        for name in "abc":
            await client.get(f"/things/{name}")
        await client.delete("/things/a")
        await client.post("/failing")
    text = shell.metrics.render().decode()
    assert 'topwork_requests_total{method="GET",route="/things/{name}",status="200"} 3.0' in text
    assert 'topwork_requests_total{method="other",route="unmatched",status="405"} 1.0' in text
    assert 'topwork_requests_total{method="POST",route="/failing",status="500"} 1.0' in text
    assert 'topwork_request_seconds_count{route="/things/{name}"} 3.0' in text


@pytest.mark.anyio
async def test_ten_thousand_unknown_paths_add_no_series(tmp_path: Path) -> None:
    shell = Shell(Settings(home=tmp_path, access_log=False))
    async with shell.client() as client:
        await client.get("/first")
        await client.request("BREW", "/first")
        before = series(shell.metrics)
        for number in range(10_000):
            await client.request(f"M{number}" if number % 100 == 0 else "GET", f"/wp-{number}.php?a={number}")
        assert series(shell.metrics) == before
    assert 'route="unmatched",status="404"} 10002.0' in shell.metrics.render().decode()


@pytest.mark.anyio
async def test_invented_methods_on_a_known_path_add_no_series(tmp_path: Path) -> None:
    shell = Shell(Settings(home=tmp_path, access_log=False))
    async with shell.client() as client:
        await client.request("BREW", "/things/1")
        before = series(shell.metrics)
        for number in range(50):
            await client.request(f"BREW{number}", "/things/1")
        assert series(shell.metrics) == before


def test_stages_batches_and_adapts() -> None:
    metrics = Metrics()
    metrics.stage("embed", 0.003)
    metrics.batch("minilm-l6-v2", 17)
    metrics.adapt("promoted")
    text = metrics.render().decode()
    assert 'topwork_stage_seconds_count{stage="embed"} 1.0' in text
    assert 'topwork_batch_items_sum{backbone="minilm-l6-v2"} 17.0' in text
    assert 'topwork_adapts_total{outcome="promoted"} 1.0' in text


def test_readings_are_taken_at_every_scrape() -> None:
    metrics = Metrics()
    depths: dict[tuple[str, ...], float] = {("a",): 3.0, ("b",): 9.0}
    metrics.registry.register(
        Readings(GaugeMetricFamily, "topwork_depth", "Depth.", ["backbone"], lambda: depths)
    )
    metrics.registry.register(Readings(CounterMetricFamily, "topwork_hits", "Hits.", [], lambda: {(): 5.0}))
    assert 'topwork_depth{backbone="a"} 3.0' in metrics.render().decode()
    depths["a",] = 4.0
    text = metrics.render().decode()
    assert 'topwork_depth{backbone="a"} 4.0' in text
    assert 'topwork_depth{backbone="b"} 9.0' in text
    assert "topwork_hits_total 5.0" in text
    assert text.count("# TYPE topwork_depth gauge") == 1


def test_jobs_are_counted_once_a_scrape_and_unknown_without_the_database() -> None:
    asked: list[int] = []

    def counts() -> dict[str, int]:
        asked.append(1)
        if len(asked) > 1:
            raise RegistryUnavailable("away")
        return {"queued": 2, "running": 1}

    cache = SimpleNamespace(hits=0, misses=0, evictions=0, bytes=0)
    parts: Any = SimpleNamespace(
        ready=lambda: True,
        batchers={},
        surveyor=SimpleNamespace(measured={}),
        monitor=SimpleNamespace(replaced=Counter()),
        fitter=SimpleNamespace(queued=0, replaced=0),
        workers=(),
        heads=cache,
        networks=cache,
        registry=SimpleNamespace(jobs=SimpleNamespace(counts=counts), live_versions=lambda: 1),
    )
    metrics = Metrics()
    add_gauges(metrics.registry, parts)
    # Registering reads nothing: the database may be away at the start.
    assert not asked
    text = metrics.render().decode()
    assert 'topwork_jobs{state="queued"} 2.0' in text
    assert 'topwork_jobs{state="running"} 1.0' in text
    assert len(asked) == 1
    assert 'topwork_jobs{state="queued"} NaN' in metrics.render().decode()


def test_no_series_tells_when_it_was_created() -> None:
    """They would double the number of series for nothing that a scrape needs."""
    metrics = Metrics()
    metrics.adapt("promoted")
    assert "_created" not in metrics.render().decode()


def test_what_many_threads_note_is_counted_once_each() -> None:
    metrics = Metrics()

    def note(_: int) -> None:
        for _ in range(1_000):
            metrics.stage("head", 0.001)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(note, range(8)))
        assert 'topwork_stage_seconds_count{stage="head"} 8000.0' in metrics.render().decode()
    metrics.stage("head", 0.001)
    assert metrics.registry.get_sample_value("topwork_stage_seconds_count", {"stage": "head"}) == 8_001
