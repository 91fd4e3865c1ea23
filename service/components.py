"""The components of a running service."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass

from adapters.adaptation.adapt import AdaptPipeline
from adapters.adaptation.catalog import AdapterCatalog
from adapters.adaptation.erasure import Eraser
from adapters.adaptation.example_editor import ExampleEditor
from adapters.adaptation.rebase import Rebaser
from adapters.adaptation.rollback import Restorer
from adapters.cache.aliases import AliasCache
from adapters.cache.feed import ChangeFeed
from adapters.cache.lru import ByteLRU
from adapters.heads.head import Head
from adapters.jobs.submission import JobSubmitter
from adapters.prediction.export import VersionExporter
from adapters.prediction.predictor import Predictor
from adapters.processes.fit_client import Fitter
from adapters.registry.registry import Registry
from adapters.storage.artifact import Store
from adapters.workers.supervisor import WorkerSupervisor
from models.batching.batcher import Batcher
from service.edge.concurrency import ConcurrencyLimit
from service.edge.key_cache import KeyCache
from service.monitoring.backbone_monitor import BackboneMonitor
from service.monitoring.metrics import Metrics
from service.monitoring.surveyor import Surveyor
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Components:
    """The components that the routes use. `batchers`: by backbone name, in the order of the settings."""

    settings: Settings
    registry: Registry
    store: Store
    aliases: AliasCache
    heads: ByteLRU[Head]
    batchers: dict[str, Batcher]
    fitter: Fitter
    pipeline: AdaptPipeline
    catalog: AdapterCatalog
    editor: ExampleEditor
    rebaser: Rebaser
    restorer: Restorer
    exporter: VersionExporter
    eraser: Eraser
    predictor: Predictor
    submitter: JobSubmitter
    uploads: ConcurrencyLimit
    keyring: KeyCache
    feed: ChangeFeed
    workers: tuple[WorkerSupervisor, ...]
    monitor: BackboneMonitor
    surveyor: Surveyor
    metrics: Metrics
    closing: AsyncExitStack

    @property
    def ready(self) -> bool:
        """Whether every backbone answers, and the fitter, the workers and the polling for commits run.

        The database is not checked: predictions go on without it.
        """
        workers = all(worker.alive for worker in self.workers)
        return self.fitter.alive and self.feed.alive and self.monitor.ready and workers

    async def aclose(self) -> None:
        """Let queued work finish, then close everything in reverse order of construction."""
        await self.closing.aclose()
