from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from adapters.registry.registry import Registry
from adapters.storage.open import open_store
from service.monitoring.gauges import Readings, add_gauges
from service.monitoring.metrics import Metrics
from service.settings import Settings
from tests.support.adapters.job_records import begin, submit
from tests.support.adapters.records import create
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


def test_what_is_counted_is_unknown_before_that_and_without_the_database(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'topwork.db'}")
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
        registry=registry,
        store=open_store(str(tmp_path / "artifacts")),
    )
    metrics = Metrics()
    add_gauges(metrics.registry, parts)

    def told() -> list[str]:
        """Queued jobs, those that succeeded, and live versions."""
        lines = dict(line.rsplit(" ", 1) for line in metrics.render().decode().splitlines())
        states = ('topwork_jobs{state="queued"}', 'topwork_jobs{state="succeeded"}')
        return [lines[name] for name in (*states, "topwork_live_versions")]

    assert told() == ["NaN", "NaN", "NaN"]
    registry.migrate()
    create(registry)
    submit(registry)
    registry.jobs.succeed(begin(registry))
    submit(registry)
    assert told() == ["1.0", "NaN", "NaN"]
    registry.totals.count()
    assert told() == ["1.0", "1.0", "1.0"]
    submit(registry)
    assert told() == ["2.0", "1.0", "1.0"]
    registry.close()
    (tmp_path / "topwork.db").unlink()
    assert told() == ["NaN", "NaN", "NaN"]
    registry.close()


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
