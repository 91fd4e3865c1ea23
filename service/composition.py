"""Builds all components of the service from the settings, and closes them again."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from adapters.adaptation.adapt import AdaptPipeline
from adapters.adaptation.catalog import AdapterCatalog
from adapters.adaptation.commands import AdapterLimits
from adapters.adaptation.erasure import Eraser
from adapters.adaptation.example_editor import ExampleEditor
from adapters.adaptation.names.label_names import LabelNameEmbedder
from adapters.adaptation.rebase import Rebaser
from adapters.adaptation.repository import AdapterRepository
from adapters.adaptation.revision.writer import RevisionWriter
from adapters.adaptation.rollback import Restorer
from adapters.cache.aliases import AliasCache
from adapters.cache.feed import ChangeFeed
from adapters.cache.lru import ByteLRU
from adapters.cache.networks import NetworkPool
from adapters.heads.head import Head
from adapters.jobs.submission import JobSubmitter
from adapters.prediction.export import VersionExporter
from adapters.prediction.neighbours import NeighbourIndex
from adapters.prediction.predictor import Predictor
from adapters.probe.fit import ProbeConfig
from adapters.processes.export import ExportFailed, ensure_exported
from adapters.processes.fit_client import Fitter
from adapters.registry.records import Alias
from adapters.registry.registry import Registry
from adapters.storage.artifact import Store
from adapters.storage.open import open_store
from adapters.threads import FairThreads
from adapters.workers.supervisor import WorkerSupervisor
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.batching.core_sharing import CoreSharing
from models.runtime.autotune import MeasuredPlan
from models.sources.source import parse_source
from models.store.exports import find
from models.survey import planned
from service.background import clear_erasures, count_totals, sweep_artifacts
from service.components import Components
from service.edge.concurrency import UPLOADS, UPLOADS_OF_A_TENANT, ConcurrencyLimit
from service.edge.key_cache import KeyCache
from service.monitoring.backbone_monitor import BackboneMonitor
from service.monitoring.gauges import Parts, add_gauges
from service.monitoring.metrics import Metrics
from service.monitoring.surveyor import Surveyor
from service.server.process import end_stuck, end_within, told_to_end, trim_memory
from service.settings import Settings

logger = logging.getLogger("topwork")

# Threads for work that waits for processes and files, in addition to those that compute.
_THREADS = 4
# Upper bounds of a fit's predicted time. Each has its own process, so short fits do not wait for long ones.
_FIT_SECONDS = (0.25, 2.0, math.inf)
# Time from the signal to a forced exit; supervisors kill after 30 s.
_END_SECONDS = 29.0


class NotExported(ExportFailed):
    """A backbone has not been exported yet."""

    def __init__(self, name: str) -> None:
        super().__init__(f"The backbone {name} is not exported. Run `python -m models.export {name}`.")


async def compose(
    settings: Settings, end: Callable[[str, Exception], None] = lambda tenant, why: None
) -> Components:
    """Build and start all components. `end(tenant, why)` aborts the requests of an erased tenant.

    Raises the error of the component that fails to start, after closing those already started.
    """
    asyncio.get_running_loop().set_default_executor(FairThreads(_THREADS + settings.usable_threads))
    metrics = Metrics()
    folders, measured = await _plans(settings)
    async with AsyncExitStack() as stack:
        fitter = Fitter(settings.max_fit_queue, _FIT_SECONDS)
        stack.push_async_callback(fitter.close)
        # The slow parts wait for files, other processes and ONNX Runtime, so they start concurrently.
        backbones, (registry, store), _ = await asyncio.gather(
            _backbones(settings, folders, measured, stack),
            asyncio.to_thread(_storage, settings),
            fitter.start(),
        )
        stack.callback(registry.close)
        feed = ChangeFeed(registry)
        keyring = KeyCache(registry.tenants.find, lambda: feed.hearing)
        stack.push_async_callback(keyring.close)

        cores = CoreSharing()

        def batcher_for(backbone: Backbone) -> Batcher:
            # Fine-tuned networks share their backbone's metric series: one series each would be unbounded.
            return Batcher(
                backbone,
                max_queue=settings.max_queue,
                workers=backbone.plan.workers,
                max_wait=settings.max_wait,
                cores=cores if backbone.device == "cpu" else None,
                observe=metrics.stage,
                observe_batch=partial(metrics.batch, backbone.spec.name),
            )

        batchers: dict[str, Batcher] = {}
        # The dictionary itself is passed, because batchers may be replaced while the service runs.
        stack.push_async_callback(_close_all, batchers)
        for name, backbone in backbones.items():
            batchers[name] = batcher_for(backbone)
            await batchers[name].start()

        networks = NetworkPool(store, settings.network_cache_bytes, batcher_for)
        stack.push_async_callback(networks.close)

        def reopen(name: str) -> Backbone:
            return _open_backbone(settings, folders[name], measured[name])

        monitor = BackboneMonitor(batchers, networks, reopen, batcher_for, end_stuck)

        async def load(alias: Alias) -> None:
            batcher = batchers.get(alias.backbone)
            if batcher is not None and batcher.backbone.spec.fingerprint == alias.fingerprint:
                await networks.prepare(alias, batcher.backbone)

        aliases = AliasCache(registry, load=load)
        heads: ByteLRU[Head] = ByteLRU(settings.head_cache_bytes, lambda head: head.nbytes)
        repository = AdapterRepository(registry, store, aliases)
        stack.callback(repository.close)
        neighbour_index = NeighbourIndex(repository)
        names = LabelNameEmbedder(batchers)
        eraser = Eraser(repository, (heads, networks, neighbour_index, keyring, names), end)
        stack.push_async_callback(aliases.close)
        await feed.start((keyring, aliases), eraser.heard)
        stack.push_async_callback(feed.close)
        limits = AdapterLimits(
            max_examples=settings.max_adapter_examples,
            max_labels=settings.max_labels,
            probe=ProbeConfig(memory_bytes=settings.max_fit_bytes, limit_seconds=settings.max_fit_seconds),
        )
        writer = RevisionWriter(repository, fitter, heads, names, limits, metrics.stage)
        pipeline = AdaptPipeline(writer, batchers, metrics.adapt)
        predictor = Predictor(aliases, store, heads, batchers, neighbour_index, networks, metrics.stage)
        workers = tuple(WorkerSupervisor(settings.worker) for _ in range(settings.workers))
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.close)
            stack.enter_context(told_to_end(worker.end))
        await monitor.start()
        stack.push_async_callback(monitor.close)
        surveyor = Surveyor(measured, batchers, networks, monitor.exchange)
        await surveyor.start()
        stack.push_async_callback(surveyor.close)
        closing = threading.Event()
        stack.callback(closing.set)
        submitter = JobSubmitter(
            pipeline,
            max_open=settings.max_jobs,
            deadline_seconds=settings.max_job_seconds,
            callback_urls=settings.callback_urls,
        )
        # A shutdown that hangs is ended by force.
        stack.enter_context(told_to_end(partial(end_within, _END_SECONDS)))
        # Daemon threads: listing a bucket may take long, and shutdown must not wait for it.
        threading.Thread(target=sweep_artifacts, args=(registry, store, closing), daemon=True).start()
        threading.Thread(
            target=clear_erasures, args=(registry, store, settings.rewrite_bytes, closing), daemon=True
        ).start()
        threading.Thread(target=count_totals, args=(registry, closing), daemon=True).start()
        threading.Thread(target=trim_memory, args=(closing,), daemon=True).start()
        components = Components(
            settings=settings,
            registry=registry,
            store=store,
            aliases=aliases,
            heads=heads,
            batchers=batchers,
            fitter=fitter,
            pipeline=pipeline,
            catalog=AdapterCatalog(repository),
            editor=ExampleEditor(pipeline),
            rebaser=Rebaser(pipeline),
            restorer=Restorer(writer),
            exporter=VersionExporter(predictor),
            eraser=eraser,
            predictor=predictor,
            submitter=submitter,
            uploads=ConcurrencyLimit("uploads", UPLOADS, UPLOADS_OF_A_TENANT),
            keyring=keyring,
            feed=feed,
            workers=workers,
            monitor=monitor,
            surveyor=surveyor,
            metrics=metrics,
            closing=stack.pop_all(),
        )
    parts = Parts(
        ready=lambda: components.ready,
        batchers=batchers,
        surveyor=surveyor,
        monitor=monitor,
        fitter=fitter,
        workers=components.workers,
        heads=heads,
        networks=networks,
        registry=registry,
        store=store,
    )
    add_gauges(metrics.registry, parts)
    return components


async def _plans(settings: Settings) -> tuple[dict[str, Path], dict[str, MeasuredPlan]]:
    """Return each backbone's export folder and execution plan by name, exporting missing backbones first.

    Plans are measured one by one, while nothing else runs.
    """
    await ensure_exported(settings.backbones)
    folders: dict[str, Path] = {}
    for entry in settings.backbones:
        folder = find(entry)
        if folder is None:
            raise NotExported(entry)
        folders[parse_source(entry).name] = folder
    plan = partial(planned, device=settings.device, threads=settings.usable_threads)
    return folders, {name: await asyncio.to_thread(plan, folder) for name, folder in folders.items()}


async def _backbones(
    settings: Settings,
    folders: Mapping[str, Path],
    measured: Mapping[str, MeasuredPlan],
    stack: AsyncExitStack,
) -> dict[str, Backbone]:
    loaded = await asyncio.gather(
        *(
            asyncio.to_thread(_open_backbone, settings, folder, measured[name])
            for name, folder in folders.items()
        )
    )
    for backbone in loaded:
        stack.callback(backbone.close)
    return dict(zip(folders, loaded, strict=True))


def _open_backbone(settings: Settings, folder: Path, measured: MeasuredPlan) -> Backbone:
    return Backbone.open(folder, device=settings.device, plan=measured.plan, limits=settings.input_limits)


async def _close_all(batchers: Mapping[str, Batcher]) -> None:
    for batcher in batchers.values():
        await batcher.close()
        batcher.backbone.close()


def _storage(settings: Settings) -> tuple[Registry, Store]:
    settings.make_home()
    store = open_store(settings.store, settings.store_options)
    registry = Registry(settings.database)
    try:
        registry.check_pages()
        registry.migrate()
        registry.identity.check(store)
    except BaseException:
        registry.close()
        raise
    return registry, store
