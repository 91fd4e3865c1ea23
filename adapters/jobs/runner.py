"""Runs attempts at jobs, one at a time, and records how they end."""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
import threading
import traceback
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from adapters.jobs.config import WorkerConfig
from adapters.jobs.lease import Lease, ShuttingDown, Stopped, checkpoint_path, checkpoints
from adapters.jobs.stored_checkpoints import delete_spent
from adapters.processes.export import ExportFailed, ensure_exported
from adapters.redaction import leaks_internals
from adapters.registry.errors import LeaseLost, RegistryUnavailable, UnknownJob
from adapters.registry.jobs import Jobs, upload_of
from adapters.registry.records import Claim, JobKind, JobRecord
from adapters.registry.registry import Registry
from adapters.storage.artifact import StoreError, StoreFull, StoreUnavailable
from adapters.storage.open import open_store
from models.errors import DomainError
from models.sources.source import entry_of

if TYPE_CHECKING:
    from adapters.jobs.bulk_adapt import Spread
    from models.preprocess.limits import InputLimits

logger = logging.getLogger("topwork")

KINDS: tuple[JobKind, ...] = get_args(JobKind)
RETRY_SECONDS = 2.0
"""Wait after an error of the registry or the store."""

_LONGEST_PAUSE = 600.0  # seconds before a released job may be claimed again
_FULL = (errno.ENOSPC, errno.EDQUOT)


# Error codes of outages. The job did not cause them, so it is retried until its deadline.
_OUTAGES = {
    RegistryUnavailable.code,
    StoreUnavailable.code,
    ExportFailed.code,
    # The codes of the fitter and the batcher, whose modules are imported only for bulk jobs.
    "fitter_unavailable",
    "backbone_unavailable",
}


class JobRunner:
    """Claims jobs and runs attempts at them, blocking, one at a time.

    `stopping`: once it is set, the attempt under way ends and its job is left to another. `writer`: see
    Registry. `spread`: see BulkAdaptJob.
    """

    def __init__(
        self,
        config: WorkerConfig,
        stopping: threading.Event,
        writer: Executor | None = None,
        spread: Spread | None = None,
    ) -> None:
        self._spread = spread
        self._config = config
        self._stopping = stopping
        self._registry = Registry(config.database, writer=writer)
        self._store = open_store(config.store, config.store_options)
        self._began = False

    @property
    def jobs(self) -> Jobs:
        """The durable jobs."""
        return self._registry.jobs

    def close(self) -> None:
        """Close the database connections."""
        self._registry.close()

    def claim(self, kinds: Collection[JobKind]) -> Claim | None:
        """Return a claim of a job of these kinds, or None if there is no job to run.

        Before that, end the jobs that no attempt may begin again.

        The first call migrates the tables and checks the store. Raises WrongStore, RegistryUnavailable,
        StoreFull, StoreUnavailable.
        """
        self._begin()
        for job in self._registry.jobs.settle():
            self._ended(job)
        if not kinds:
            return None
        return self._registry.jobs.claim(
            self._config.lease_seconds,
            kinds=kinds,
            max_running_per_tenant=self._config.max_running_per_tenant,
        )

    def run(self, claim: Claim) -> None:
        """Run the attempt and record its outcome."""
        job = claim.job
        logger.info("job %s of %s: attempt %d", job.id, job.adapter, job.attempt)
        lease = Lease(self._registry.jobs, claim, self._config.lease_seconds, self._stopping)
        try:
            with lease:
                if job.kind == "bulk_adapt":
                    self._take_in(lease)
                else:
                    self._tune(lease)
        except Exception as error:
            self.give_up(lease, error)
        else:
            logger.info("job %s succeeded", job.id)
            self._ended(job)

    def tidy(self) -> None:
        """Remove checkpoints of jobs that have ended or were deleted with their adapter."""
        delete_spent(self._registry.jobs, self._store)
        left = checkpoints(Path(self._config.scratch))
        if not left:
            return
        try:
            wanted = self._registry.jobs.open_ids()
        except RegistryUnavailable as error:
            logger.warning("checkpoints stay for now: %s", error)
            return
        for path in left:
            if path.name.partition(".")[0] in wanted:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Migrate the tables and check the store, once."""
        if not self._began:
            self._registry.migrate()
            self._registry.identity.check(self._store)
            self._began = True

    def give_up(self, lease: Lease, error: Exception) -> None:
        """Record the outcome of a failed attempt, whose lease is no longer kept."""
        if self._recorded_as(lease, error):
            self._ended(lease.claim.job)

    def _recorded_as(self, lease: Lease, error: Exception) -> bool:
        """Record the outcome of a failed attempt; return whether the job has ended."""
        jobs, claim, job = self._registry.jobs, lease.claim, lease.claim.job
        if lease.recorded is not None:
            # The outcome is recorded; the error came after the lease had ended, and does not count.
            return not isinstance(lease.recorded, ShuttingDown)
        if isinstance(error, LeaseLost):
            logger.warning("job %s: the lease is lost; what this attempt did is dropped", job.id)
            # The job may have been deleted with its adapter or tenant.
            self.tidy()
            return False
        if isinstance(error, Stopped):
            return self._recorded(lambda: lease.record(error)) and not isinstance(error, ShuttingDown)
        code, detail = error.code if isinstance(error, DomainError) else None, str(error)
        if code in _OUTAGES:
            logger.warning("job %s is left to another attempt: %s", job.id, error)
            # The pause grows with each release, because the job itself may cause the outage.
            pause = min(RETRY_SECONDS + self._config.lease_seconds * job.released, _LONGEST_PAUSE)
            self._recorded(lambda: jobs.release(claim, pause))
            return False
        if isinstance(error, OSError) and error.errno in _FULL:
            code, detail = StoreFull.code, "The worker's disk is full; make room, then try again."
        if code is None or leaks_internals(detail):
            traceback.print_exception(error)
            code, detail = code or "internal_error", "The worker's log has the cause."
        return self._recorded(lambda: jobs.fail(claim, code, detail))

    def _ended(self, job: JobRecord) -> None:
        """Remove the checkpoint and the upload of an ended job, and send its callback."""
        delete_spent(self._registry.jobs, self._store)
        checkpoint_path(Path(self._config.scratch), job.id).unlink(missing_ok=True)
        try:
            self._store.delete(job.tenant, job.adapter_uid, upload_of(job.request))
        except StoreError as error:
            logger.warning("the upload of the job %s stays until the next sweep: %s", job.id, error)
        if "callback" not in job.request:
            return
        from adapters.jobs.callback_sender import send_callback

        try:
            send_callback(self._registry.jobs.job(job.tenant, job.id), self._config.callback_secrets)
        except (RegistryUnavailable, UnknownJob, StoreFull) as error:
            logger.warning("no callback is sent for the job %s: %s", job.id, error)

    def _take_in(self, lease: Lease) -> None:
        from adapters.adaptation.commands import AdapterLimits
        from adapters.examples.upload import UploadLimits
        from adapters.jobs.bulk_adapt import BulkAdaptJob
        from adapters.probe.fit import ProbeConfig

        config = self._config
        limits = AdapterLimits(
            config.max_adapter_examples, config.max_labels, ProbeConfig(memory_bytes=config.max_fit_bytes)
        )
        bulk = BulkAdaptJob(
            self._registry,
            self._store,
            device="cuda" if config.device == "cuda" else "cpu",
            threads=config.threads,
            uploads=UploadLimits(config.max_upload_examples, self._input_limits),
            limits=limits,
            backbones=config.backbones,
            spread=self._spread,
        )
        backbone = self._registry.adapter(lease.claim.job.tenant, lease.claim.job.adapter).backbone
        asyncio.run(ensure_exported([entry_of(backbone, config.backbones)], lease.check))
        bulk.run(lease)

    def _tune(self, lease: Lease) -> None:
        # Importing torch takes seconds and hundreds of megabytes, so an idle worker does not. The lease is
        # held during the import.
        import torch

        from adapters.jobs.fine_tune import FineTuneJob

        config = self._config
        torch.set_num_threads(config.threads)
        tuning = FineTuneJob(
            self._registry,
            self._store,
            Path(config.scratch),
            config.device,
            self._input_limits,
            config.backbones,
        )
        tuning.run(lease)

    @property
    def _input_limits(self) -> InputLimits:
        from models.preprocess.limits import InputLimits

        config = self._config
        return InputLimits(config.max_image_bytes, config.max_image_pixels, config.max_text_chars)

    def _recorded(self, end: Callable[[], None]) -> bool:
        """End the attempt; return whether that is recorded. Retries while the lease may last."""
        while True:
            try:
                end()
                return True
            except LeaseLost as error:
                logger.warning("the end of a job is not recorded: %s", error)
                return False
            except (RegistryUnavailable, StoreFull) as error:
                logger.warning("the end of a job cannot be recorded: %s", error)
                if self._stopping.wait(RETRY_SECONDS):
                    return False
