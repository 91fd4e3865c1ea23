"""`python -m adapters.worker`: claims jobs and runs them, one at a time, in a niced process of its own.

Its settings come as one line of JSON on standard input, for a database URL may hold a password and a process
list shows arguments. It ends when its standard input does, which is also when its parent is killed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

from adapters.calling_back import call_back
from adapters.jobs import upload_of
from adapters.lease import Cancelled, DeadlinePassed, Lease, ShuttingDown, checkpoint_path, checkpoints
from adapters.records import Claim, JobKind, JobRecord, LeaseLost, RegistryError, RegistryUnavailable
from adapters.registry import Registry
from adapters.store import StoreError, StoreFull, StoreUnavailable, open_store
from adapters.supervising import WorkerConfig

logger = logging.getLogger("topwork")

_KINDS: tuple[JobKind, ...] = ("fine_tune", "bulk_adapt")
_NICENESS = 10
_RETRY_SECONDS = 5.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Worker:
    """Claims and runs jobs until `stopping` is set."""

    def __init__(self, config: WorkerConfig, stopping: threading.Event) -> None:
        self._config = config
        self._stopping = stopping
        self._registry = Registry(config.database)
        self._store = open_store(config.store, config.store_options)

    def run(self) -> None:
        """Returns once it is to stop and nothing runs any more."""
        while not self._stopping.is_set():
            try:
                claim = self._registry.jobs.claim(
                    self._config.lease_seconds,
                    kinds=_KINDS,
                    max_running_per_tenant=self._config.max_running_per_tenant,
                )
            except RegistryUnavailable as error:
                logger.warning("no job can be claimed: %s", error)
                self._stopping.wait(_RETRY_SECONDS)
                continue
            if claim is None:
                self._tidy()
                self._stopping.wait(self._config.poll_seconds)
            else:
                self._do(claim)

    def close(self) -> None:
        """Closes the connections."""
        self._registry.close()

    def _do(self, claim: Claim) -> None:
        """One attempt, and what becomes of the job."""
        jobs, job = self._registry.jobs, claim.job
        logger.info("job %s of %s: attempt %d", job.id, job.adapter, job.attempt)
        try:
            with Lease(jobs, claim, self._config.lease_seconds, self._stopping) as lease:
                if job.kind == "bulk_adapt":
                    self._take_in(lease)
                else:
                    self._tune(lease)
            logger.info("job %s succeeded", job.id)
        except LeaseLost:
            logger.warning("job %s: the lease is lost; what this attempt did is dropped", job.id)
            return
        except (ShuttingDown, RegistryUnavailable, StoreUnavailable) as error:
            logger.warning("job %s is left to another attempt: %s", job.id, str(error) or "shutting down")
            self._settle(lambda: jobs.release(claim))
            return
        except Cancelled:
            self._settle(lambda: jobs.cancelled(claim))
        except DeadlinePassed:
            self._settle(lambda: jobs.fail(claim, "deadline_exceeded", "The job did not end in time."))
        except Exception as error:
            code, detail = getattr(error, "code", None), str(error)
            if isinstance(error, OSError) and error.errno in _FULL:
                code, detail = StoreFull.code, "The worker's disk is full; make room, then try again."
            if code is None:
                traceback.print_exc()
                code, detail = "internal_error", "The worker's log has the cause."
            self._settle(lambda: jobs.fail(claim, code, detail))
        self._ended(job)

    def _ended(self, job: JobRecord) -> None:
        """Removes what only the job needed, and tells of its end."""
        checkpoint_path(Path(self._config.scratch), job.id).unlink(missing_ok=True)
        try:
            self._store.delete(job.tenant, job.adapter_uid, upload_of(job.request))
        except StoreError as error:
            logger.warning("the upload of the job %s stays until the next sweep: %s", job.id, error)
        try:
            call_back(self._registry.jobs.job(job.tenant, job.id))
        except RegistryError as error:
            logger.warning("nobody is called back for the job %s: %s", job.id, error)

    def _take_in(self, lease: Lease) -> None:
        from adapters.bulk import Bulk
        from adapters.linear_probe import ProbeConfig
        from adapters.revising import AdapterLimits
        from adapters.uploads import UploadLimits
        from models.preprocess import InputLimits

        config = self._config
        limits = AdapterLimits(
            config.max_adapter_examples, config.max_labels, ProbeConfig(memory_bytes=config.max_fit_bytes)
        )
        inputs = InputLimits(config.max_image_bytes, config.max_image_pixels, config.max_text_chars)
        bulk = Bulk(
            self._registry,
            self._store,
            device="cuda" if config.device == "cuda" else "cpu",
            threads=config.threads,
            uploads=UploadLimits(config.max_upload_examples, inputs),
            limits=limits,
        )
        bulk.run(lease)

    def _tune(self, lease: Lease) -> None:
        # Torch takes seconds and hundreds of megabytes: a worker without work does without, and one with work
        # holds its lease meanwhile.
        import torch

        from adapters.tuning import Tuning

        torch.set_num_threads(self._config.threads)
        scratch = Path(self._config.scratch)
        Tuning(self._registry, self._store, scratch, self._config.device).run(lease)

    def _tidy(self) -> None:
        """Removes checkpoints of jobs that have ended, or went with their adapter."""
        left = checkpoints(Path(self._config.scratch))
        if not left:
            return
        try:
            wanted = self._registry.jobs.open_ids()
        except RegistryUnavailable as error:
            logger.warning("checkpoints stay for now: %s", error)
            return
        for path in left:
            if path.stem not in wanted:
                path.unlink(missing_ok=True)

    def _settle(self, end: Callable[[], None]) -> None:
        """Ends the attempt; where that cannot be recorded, its lease runs out."""
        try:
            end()
        except (RegistryError, StoreError) as error:
            logger.warning("the end of a job could not be recorded: %s", error)


def _end_with(pipe: IO[str], stopping: threading.Event) -> None:
    """Stops when the pipe closes: there is nobody left to work for."""

    def wait() -> None:
        pipe.read()
        stopping.set()

    threading.Thread(target=wait, name="parent", daemon=True).start()


def work(config: WorkerConfig, stopping: threading.Event) -> None:
    """Runs jobs at low priority until SIGTERM, or until `stopping` is set."""
    os.nice(_NICENESS)
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    worker = Worker(config, stopping)
    try:
        worker.run()
    finally:
        worker.close()


def main() -> None:
    """Runs jobs until standard input ends, or SIGTERM."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logger.setLevel(logging.INFO)
    stopping = threading.Event()
    # Ctrl-C in a terminal reaches every process: the parent decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = WorkerConfig(**json.loads(sys.stdin.readline()))
    _end_with(sys.stdin, stopping)
    work(config, stopping)


if __name__ == "__main__":
    main()
