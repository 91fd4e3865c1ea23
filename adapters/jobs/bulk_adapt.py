"""Runs a bulk job: stores an upload's examples in batches, then fits a head on them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import BinaryIO, Literal, cast

from adapters.adaptation.adapt import AdaptPipeline
from adapters.adaptation.commands import AdapterFull, AdapterLimits, ContractChanged
from adapters.adaptation.names.label_names import LabelNameEmbedder
from adapters.adaptation.repository import AdapterRepository
from adapters.adaptation.revision.writer import RevisionWriter
from adapters.cache.aliases import AliasCache
from adapters.cache.lru import ByteLRU
from adapters.examples.upload import UploadLimits
from adapters.heads.head import Head
from adapters.jobs.bulk_attempt import BATCH_EXAMPLES, AheadEmbedder, BulkAttempt
from adapters.jobs.lease import Lease
from adapters.probe.fit import TooCostly
from adapters.processes.fit_client import Fitter
from adapters.registry.jobs import upload_of
from adapters.registry.records import AdapterRecord, JobRecord
from adapters.registry.registry import Registry
from adapters.storage.artifact import Store
from adapters.threads import DATABASE
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.errors import Invalid
from models.sources.source import entry_of
from models.spec import UnknownBackbone
from models.store.exports import find
from models.store.manifest import read_manifest

Spread = Callable[[Batcher, AdapterRecord, JobRecord], AheadEmbedder]
"""Makes what embeds an upload's inputs on other machines too."""


class BulkAdaptJob:
    """Runs bulk jobs. Blocking, one at a time.

    `threads`: threads of the backbone. `backbones`: entries of the settings, which have the short names; the
    first one for texts reads the names of images' labels.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        *,
        device: Literal["cpu", "cuda"],
        threads: int,
        uploads: UploadLimits,
        limits: AdapterLimits,
        backbones: Sequence[str] = (),
        spread: Spread | None = None,
    ) -> None:
        self._spread = spread
        self._registry = registry
        self._store = store
        self._device = device
        self._threads = threads
        self._uploads = uploads
        self._backbones = backbones
        # The job's deadline replaces the limit on the time of a fit.
        self._limits = replace(limits, probe=replace(limits.probe, limit_seconds=float("inf")))

    def run(self, lease: Lease) -> None:
        """Run the job and record its success.

        The job's request has the keys "form", "upload", "update", "promote", "fit", "columns" and those of
        FitOptions; requests of an older release lack some of them. Examples that were
        stored stay if the job ends early, and another attempt does not embed them again. Raises BadUpload,
        OneLabel, NothingToFit, AdapterFull, InputError, StoreError, RegistryUnavailable, and what Lease.check
        raises.
        """
        asyncio.run(self._run(lease))

    async def _run(self, lease: Lease) -> None:
        job = lease.claim.job
        adapter = self._registry.adapter(job.tenant, job.adapter)
        export = find(entry_of(adapter.backbone, self._backbones))
        if export is None:
            raise UnknownBackbone(f"The backbone {adapter.backbone} is not exported where this worker runs.")
        backbone = Backbone.open(
            export, device=self._device, threads=self._threads, limits=self._uploads.inputs
        )
        batcher = Batcher(backbone, max_queue=BATCH_EXAMPLES, workers=self._threads)
        batchers = {adapter.backbone: batcher, **self._readers(adapter)}
        ahead = self._spread(batcher, adapter, job) if self._spread is not None else None
        fitter = Fitter()
        repository = AdapterRepository(
            self._registry, self._store, AliasCache(self._registry), job=lease.claim
        )
        try:
            await asyncio.gather(*(one.start() for one in batchers.values()), fitter.start())
            heads = ByteLRU[Head](0, lambda head: head.nbytes)
            writer = RevisionWriter(repository, fitter, heads, LabelNameEmbedder(batchers), self._limits)
            pipeline = AdaptPipeline(writer, {adapter.backbone: ahead or batcher})
            work = BulkAttempt(lease, adapter, pipeline, batcher, self._uploads, ahead)
            with tempfile.TemporaryFile(prefix="topwork-upload-") as file:
                for part in upload_of(job.request):
                    file.write(self._store.read(job.tenant, adapter.uid, part))
                await work.store(cast(BinaryIO, file))
            await work.finish()
        except (Invalid, AdapterFull, ContractChanged, TooCostly):
            # The upload caused the error, so the tenant gets the progress with all rejected examples.
            await DATABASE.run(lease.tell)
            raise
        finally:
            if ahead is not None:
                ahead.close()
            repository.close()
            for one in batchers.values():
                await one.close()
            await fitter.close()
            for one in batchers.values():
                one.backbone.close()

    def _readers(self, adapter: AdapterRecord) -> dict[str, Batcher]:
        """Return the backbone that reads the names of an image adapter's labels, if they are needed."""
        if adapter.kind == "text" or not adapter.meanings:
            return {}
        for export in filter(None, map(find, self._backbones)):
            if read_manifest(export, verify=False).kind == "text":
                reader = Backbone.open(export, threads=self._threads)
                return {reader.spec.name: Batcher(reader, max_queue=BATCH_EXAMPLES, workers=self._threads)}
        return {}
