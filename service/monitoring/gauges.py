"""Metrics that are read from other components at each scrape."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Gauge, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.registry.errors import RegistryUnavailable
from adapters.registry.records import JobState
from models.preprocess.decoder import Decoder
from service import __version__
from service.server.connections import CUT, connections

if TYPE_CHECKING:
    from adapters.cache.lru import ByteLRU
    from adapters.cache.networks import NetworkPool
    from adapters.heads.head import Head
    from adapters.processes.fit_client import Fitter
    from adapters.registry.registry import Registry
    from adapters.storage.artifact import Store
    from adapters.workers.supervisor import WorkerSupervisor
    from models.batching.batcher import Batcher
    from service.monitoring.backbone_monitor import BackboneMonitor
    from service.monitoring.surveyor import Surveyor


@dataclass(frozen=True, slots=True)
class Parts:
    """The components that the gauges read."""

    ready: Callable[[], bool]  # whether the service can do all its work
    batchers: Mapping[str, Batcher]
    surveyor: Surveyor
    monitor: BackboneMonitor
    fitter: Fitter
    workers: Sequence[WorkerSupervisor]
    heads: ByteLRU[Head]
    networks: NetworkPool
    registry: Registry
    store: Store


Series = Mapping[tuple[str, ...], float]
"""Values of a metric by the values of its labels."""


class Readings(Collector):
    """A metric that is read in one call at each scrape, with all its series."""

    def __init__(
        self,
        family: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        labels: Sequence[str],
        read: Callable[[], Series],
    ) -> None:
        self._new = partial(family, name, text, labels=labels)
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Return the metric as it is now."""
        metric = self._new()
        for values, value in self._read().items():
            metric.add_metric(values, value)
        return [metric]


def add_gauges(registry: CollectorRegistry, parts: Parts) -> None:
    """Register the gauges and counters of the components, of memory and of the database."""
    build = {"version": __version__, "python": platform.python_version(), "bentoml": version("bentoml")}
    Info("topwork_build", "Always 1; the labels say what runs.", registry=registry).info(build)
    gauges: dict[str, tuple[str, Callable[[], float]]] = {
        "ready": ("1 while the service can do all its work.", parts.ready),
        "store_available": (
            "0 while the bucket does not answer and calls to it are refused, otherwise 1.",
            lambda: parts.store.available,
        ),
        "fits_queued": ("Fits waiting or running.", lambda: parts.fitter.queued),
        "connections": ("Connections that are open.", lambda: len(connections)),
        "head_cache_bytes": ("Bytes of the heads in memory.", lambda: parts.heads.bytes),
        "network_cache_bytes": (
            "Bytes of the fine-tuned networks in memory, about.",
            lambda: parts.networks.bytes,
        ),
        "live_versions": (
            "Adapters with a live version, counted once a minute for all processes: up to two minutes old.",
            lambda: _live_versions(parts.registry),
        ),
    }
    for name, (text, read) in gauges.items():
        Gauge(f"topwork_{name}", text, registry=registry).set_function(read)
    totals: dict[str, tuple[str, Sequence[str], Callable[[], Series]]] = {
        "replaced": (
            "Parts that died or were stuck, and were replaced.",
            ["part"],
            lambda: _replaced(parts),
        ),
        "connections_cut": (
            "Connections that were cut off, by reason.",
            ["why"],
            lambda: {(why,): connections.cut[why] for why in CUT},
        ),
        "head_cache_hits": (
            "Predictions that found their head in memory.",
            [],
            lambda: {(): parts.heads.hits},
        ),
        "head_cache_misses": (
            "Predictions that loaded their head.",
            [],
            lambda: {(): parts.heads.misses},
        ),
        "head_cache_evictions": (
            "Heads that made room for others.",
            [],
            lambda: {(): parts.heads.evictions},
        ),
        "network_cache_misses": (
            "Predictions that waited for their fine-tuned network.",
            [],
            lambda: {(): parts.networks.misses},
        ),
    }
    for name, (text, labels, read_all) in totals.items():
        registry.register(Readings(CounterMetricFamily, f"topwork_{name}", text, labels, read_all))
    text = (
        "Jobs by state, over all processes that share the database. "
        "Jobs that have ended are counted once a minute: up to two minutes old."
    )
    registry.register(
        Readings(GaugeMetricFamily, "topwork_jobs", text, ["state"], lambda: _jobs(parts.registry))
    )
    _add_backbones(registry, parts.batchers, parts.surveyor)


def _add_backbones(registry: CollectorRegistry, batchers: Mapping[str, Batcher], surveyor: Surveyor) -> None:
    """Register the metrics of backbones. Batchers are replaced while the service runs."""
    info = Info(
        "topwork_backbone",
        "Always 1; the labels say what a backbone runs on.",
        ["backbone"],
        registry=registry,
    )
    for name, batcher in batchers.items():
        backbone = batcher.backbone
        facts = {"device": backbone.device, "precision": backbone.precision}
        info.labels(name).info({**facts, "fingerprint": backbone.spec.fingerprint})
    gauges: dict[str, tuple[str, Sequence[str], Callable[[], Series]]] = {
        "queue_depth": (
            "Inputs waiting for a backbone.",
            ["backbone"],
            lambda: {(name,): batcher.depth for name, batcher in batchers.items()},
        ),
        "backbone_plan": (
            "How a backbone runs: threads alone, runs beside each other, threads of each, batch.",
            ["backbone", "setting"],
            lambda: {
                (name, setting): getattr(batcher.backbone.plan, setting)
                for name, batcher in batchers.items()
                for setting in ("alone", "workers", "beside", "batch")
            },
        ),
        "backbone_plan_confirmed": (
            "1 if that was measured while the machine was quiet.",
            ["backbone"],
            lambda: {(name,): surveyor.measured[name].confirmed for name in batchers},
        ),
    }
    for name, (text, labels, read) in gauges.items():
        registry.register(Readings(GaugeMetricFamily, f"topwork_{name}", text, labels, read))
    if any(batcher.backbone.seconds_by_stage for batcher in batchers.values()):
        registry.register(
            Readings(
                CounterMetricFamily,
                "topwork_gpu_seconds",
                "Seconds that the thread which runs on the GPU has spent, by what it did.",
                ["backbone", "stage"],
                lambda: {
                    (name, stage): seconds
                    for name, batcher in batchers.items()
                    for stage, seconds in batcher.backbone.seconds_by_stage.items()
                },
            )
        )


def _replaced(parts: Parts) -> Series:
    return {
        ("backbone",): parts.monitor.replaced["backbone"],
        ("network",): parts.monitor.replaced["network"],
        ("fitter",): parts.fitter.replaced,
        ("worker",): sum(worker.replaced for worker in parts.workers),
        ("decoder",): Decoder.shared().ended,
    }


def _jobs(registry: Registry) -> Series:
    """Return the jobs in each state; NaN for what is not known, as while the database is unavailable."""
    found: dict[JobState, float] = dict.fromkeys(get_args(JobState), math.nan)
    with suppress(RegistryUnavailable):
        counted = registry.totals.counted()
        if counted is not None:
            found.update(counted.jobs)
        found.update(registry.totals.open_jobs())
    return {(state,): number for state, number in found.items()}


def _live_versions(registry: Registry) -> float:
    """Return NaN while the database is unavailable, so that the scrape of all other metrics succeeds."""
    with suppress(RegistryUnavailable):
        counted = registry.totals.counted()
        return math.nan if counted is None else counted.live_versions
    return math.nan
