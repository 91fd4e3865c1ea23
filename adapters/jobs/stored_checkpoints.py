"""Checkpoints in the store, so that a job goes on wherever it is claimed next."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from types import TracebackType

from adapters.adaptation.artifacts import delete_unreferenced, kept_if_committed
from adapters.registry.errors import LeaseLost, RegistryUnavailable
from adapters.registry.jobs import Jobs
from adapters.registry.records import Claim, JobRecord
from adapters.storage.artifact import CorruptArtifact, MissingArtifact, Store, StoreError

logger = logging.getLogger("topwork")

# Training is slowed down for a tenth of its time at most, and a lost host costs what it trained during ten
# times an upload, or in an epoch if that is longer.
_REST = 9.0


class CheckpointUploader:
    """Copies an attempt's newest checkpoint to the store while it trains; a context manager.

    `path`: the file in which the attempt keeps it. `rest`: pause after an upload, as a multiple of the time
    it took. An upload that fails is logged. Once the lease is lost or the job has ended, nothing more is
    kept.
    """

    def __init__(self, jobs: Jobs, store: Store, claim: Claim, path: Path, *, rest: float = _REST) -> None:
        self._jobs = jobs
        self._store = store
        self._claim = claim
        self._path = path
        self._rest = rest
        self._written = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

    def __enter__(self) -> CheckpointUploader:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._written.set()
        self._thread.join()

    def written(self) -> None:
        """Have the file uploaded in the background, when that is due."""
        self._written.set()

    def _run(self) -> None:
        while self._written.wait() and not self._closing.is_set():
            self._written.clear()
            begun = time.monotonic()
            try:
                self._upload()
            except LeaseLost:
                return
            except (StoreError, RegistryUnavailable, OSError) as error:
                logger.warning("the checkpoint of an epoch is not in the store: %s", error)
            self._closing.wait(self._rest * (time.monotonic() - begun))

    def _upload(self) -> None:
        job = self._claim.job
        artifact = self._store.publish(job.tenant, job.adapter_uid, self._path.read_bytes())
        with kept_if_committed(self._store, job.tenant, job.adapter_uid, [artifact]):
            replaced = self._jobs.keep_checkpoint(self._claim, artifact)
        if replaced is not None:
            delete_unreferenced(self._store, job.tenant, job.adapter_uid, [replaced])


def fetch_checkpoint(store: Store, job: JobRecord, path: Path) -> bool:
    """Write the job's checkpoint in the store to the file; return whether there is one.

    One that is missing or damaged is logged: training then starts over. Raises StoreUnavailable.
    """
    if job.checkpoint is None:
        return False
    try:
        path.write_bytes(store.read(job.tenant, job.adapter_uid, job.checkpoint))
        return True
    except (MissingArtifact, CorruptArtifact, OSError) as error:
        logger.warning("a checkpoint in the store cannot be used: %s", error)
        return False


def delete_spent(jobs: Jobs, store: Store) -> None:
    """Delete the checkpoints of jobs that have ended from the store. Those that cannot be deleted stay."""
    try:
        for job in jobs.with_spent_checkpoint():
            if job.checkpoint is not None:
                store.delete(job.tenant, job.adapter_uid, [job.checkpoint])
            jobs.forget_checkpoint(job)
    except (RegistryUnavailable, StoreError) as error:
        logger.warning("checkpoints stay in the store for now: %s", error)
