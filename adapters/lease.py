"""Holds a claimed job's lease while its work is done, and tells the work when to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from adapters.jobs import Jobs
from adapters.records import Claim, LeaseLost, RegistryUnavailable

logger = logging.getLogger("topwork")

# Heartbeats in the time of a lease, so that one or two may fail.
_BEATS = 3.0
# Between looks for a request to cancel: the work stops within five seconds of it.
_MOST_SECONDS = 2.0


class Stopped(Exception):
    """The work is to end now, and publishes nothing."""


class Cancelled(Stopped):
    """The tenant asked for it."""


class DeadlinePassed(Stopped):
    """The job took longer than it may."""


class ShuttingDown(Stopped):
    """The worker ends; another attempt begins elsewhere."""


class Lease:
    """Beats for the job in a thread of its own; a context manager. The methods are for the work's thread."""

    def __init__(self, jobs: Jobs, claim: Claim, seconds: float, stopping: threading.Event) -> None:
        self.claim = claim
        self._progress: Mapping[str, Any] | None = None
        self._began: tuple[float, float] | None = None
        self._jobs = jobs
        self._seconds = seconds
        self._stopping = stopping
        self._why: Exception | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def check(self) -> None:
        """Raises Cancelled, DeadlinePassed, ShuttingDown or LeaseLost once there is a reason."""
        if self._stopping.is_set():
            raise ShuttingDown
        if self._why is not None:
            raise self._why

    def report(self, share: float, progress: Mapping[str, Any]) -> None:
        """What the next heartbeat tells, with the share of the work that is done and about how long it takes.

        share: 0 to 1. The rest is taken to go as fast as what this attempt has done by now.
        """
        now = time.monotonic()
        if self._began is None:
            self._began = (now, share)
        since, done = now - self._began[0], share - self._began[1]
        left = round(since * (1.0 - share) / done, 1) if done > 0.0 else None
        self._progress = {**progress, "share": round(share, 4), "seconds_left": left}

    def tell(self) -> None:
        """Tells at once what was last reported. Raises LeaseLost, RegistryUnavailable."""
        self._jobs.heartbeat(self.claim, self._seconds, self._progress)

    def _beat(self) -> None:
        reported: Mapping[str, Any] | None = None
        while not self._done.wait(min(self._seconds / _BEATS, _MOST_SECONDS)):
            progress = self._progress
            try:
                news = progress if progress is not reported else None
                heard = self._jobs.heartbeat(self.claim, self._seconds, news)
            except RegistryUnavailable as error:
                # While the lease lasts, another beat may get through; after it, the next one is refused.
                logger.warning("a heartbeat of the job %s failed: %s", self.claim.job.id, error)
                continue
            except LeaseLost as error:
                self._why = error
                return
            reported = progress
            if heard.cancel_requested:
                self._why = Cancelled()
            elif heard.deadline_passed:
                self._why = DeadlinePassed()


def checkpoint_path(scratch: Path, job_id: str) -> Path:
    """Where a job's work leaves what another attempt can go on with."""
    return scratch / f"{job_id}.safetensors"


def checkpoints(scratch: Path) -> list[Path]:
    """What any work has left, half written too; the stem of each name is its job's id."""
    return [path for form in ("*.safetensors", "*.partial") for path in scratch.glob(form)]
