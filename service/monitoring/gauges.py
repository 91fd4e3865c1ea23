"""Metrics that are read from other components at each scrape."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, get_args

from adapters.registry.errors import RegistryUnavailable
from adapters.registry.records import JobState
from models.preprocess.decoder import Decoder
from service import __version__
from service.server.connections import CUT, connections

if TYPE_CHECKING:
    from adapters.cache.lru import ByteLRU
    from adapters.cache.networks import NetworkPool
    from adapters.heads.head import Head
    from adapters.jobs.supervisor import WorkerSupervisor
    from adapters.processes.fit_client import Fitter
    from adapters.registry.registry import Registry
    from models.batching.batcher import Batcher
    from service.monitoring.backbone_monitor import BackboneMonitor
    from service.monitoring.metrics import Metrics
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


def add_gauges(metrics: Metrics, parts: Parts) -> None:
    """Register the gauges and counters of the components, of memory and of the database."""
    gauge, counter = metrics.gauge, metrics.counter
    build = {"version": __version__, "python": platform.python_version(), "bentoml": version("bentoml")}
    gauge("topwork_build_info", "Always 1; the labels say what runs.", lambda: 1.0, build)
    gauge("topwork_ready", "1 while the service can do all its work.", lambda: float(parts.ready()))
    for name, batcher in parts.batchers.items():
        backbone = batcher.backbone
        about = {
            "backbone": name,
            "device": backbone.device,
            "precision": backbone.precision,
            "fingerprint": backbone.spec.fingerprint,
        }
        gauge(
            "topwork_backbone_info", "Always 1; the labels say what a backbone runs on.", lambda: 1.0, about
        )
        gauge(
            "topwork_queue_depth",
            "Inputs waiting for a backbone.",
            partial(_depth, parts.batchers, name),
            {"backbone": name},
        )
        for setting in ("alone", "workers", "beside", "batch"):
            gauge(
                "topwork_backbone_plan",
                "How a backbone runs: threads alone, runs beside each other, threads of each, batch.",
                partial(_plan, parts.batchers, name, setting),
                {"backbone": name, "setting": setting},
            )
        gauge(
            "topwork_backbone_plan_confirmed",
            "1 if that was measured while the machine was quiet.",
            partial(_confirmed, parts.surveyor, name),
            {"backbone": name},
        )
        for stage in backbone.seconds_by_stage:
            counter(
                "topwork_gpu_seconds",
                "Seconds that the thread which runs on the GPU has spent, by what it did.",
                partial(_seconds, parts.batchers, name, stage),
                {"backbone": name, "stage": stage},
            )
    _watch_replacements(metrics, parts)
    _watch_connections(metrics)
    gauge("topwork_fits_queued", "Fits waiting or running.", lambda: float(parts.fitter.queued))
    heads = parts.heads
    counter(
        "topwork_head_cache_hits", "Predictions that found their head in memory.", lambda: float(heads.hits)
    )
    counter("topwork_head_cache_misses", "Predictions that loaded their head.", lambda: float(heads.misses))
    counter(
        "topwork_head_cache_evictions", "Heads that made room for others.", lambda: float(heads.evictions)
    )
    gauge("topwork_head_cache_bytes", "Bytes of the heads in memory.", lambda: float(heads.bytes))
    gauge(
        "topwork_network_cache_bytes",
        "Bytes of the fine-tuned networks in memory, about.",
        lambda: float(parts.networks.bytes),
    )
    counter(
        "topwork_network_cache_misses",
        "Predictions that waited for their fine-tuned network.",
        lambda: float(parts.networks.misses),
    )
    for state in get_args(JobState):
        gauge(
            "topwork_jobs",
            "Jobs by state, over all processes that share the database.",
            partial(_jobs, parts.registry, state),
            {"state": state},
        )
    gauge("topwork_live_versions", "Adapters with a live version.", partial(_live_versions, parts.registry))


def _watch_replacements(metrics: Metrics, parts: Parts) -> None:
    monitor, fitter, workers = parts.monitor, parts.fitter, parts.workers
    counts: dict[str, Callable[[], int]] = {
        "backbone": lambda: monitor.replaced["backbone"],
        "network": lambda: monitor.replaced["network"],
        "fitter": lambda: fitter.replaced,
        "worker": lambda: sum(worker.replaced for worker in workers),
        "decoder": lambda: Decoder.shared().ended,
    }
    for part, count in counts.items():
        metrics.counter(
            "topwork_replaced", "Parts that died or were stuck, and were replaced.", count, {"part": part}
        )


def _watch_connections(metrics: Metrics) -> None:
    metrics.gauge("topwork_connections", "Connections that are open.", lambda: float(len(connections)))
    for why in CUT:
        metrics.counter(
            "topwork_connections_cut",
            "Connections that were cut off, by reason.",
            partial(connections.cut.__getitem__, why),
            {"why": why},
        )


def _plan(batchers: Mapping[str, Batcher], name: str, setting: str) -> float:
    return float(getattr(batchers[name].backbone.plan, setting))


def _seconds(batchers: Mapping[str, Batcher], name: str, stage: str) -> float:
    return batchers[name].backbone.seconds_by_stage[stage]


def _confirmed(surveyor: Surveyor, name: str) -> float:
    return float(surveyor.measured[name].confirmed)


def _depth(batchers: Mapping[str, Batcher], name: str) -> float:
    return float(batchers[name].depth)


def _jobs(registry: Registry, state: JobState) -> float:
    try:
        return float(registry.jobs.counts()[state])
    except RegistryUnavailable:
        return math.nan


def _live_versions(registry: Registry) -> float:
    """Return NaN while the database is unavailable, so that the scrape of all other metrics succeeds."""
    try:
        return float(registry.live_versions())
    except RegistryUnavailable:
        return math.nan
