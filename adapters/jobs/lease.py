"""Holds a claimed job's lease while its work is done, and tells the work when to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from adapters.registry.jobs import Jobs
from adapters.registry.records import Claim, Heartbeat, RegistryUnavailable
from adapters.storage.artifact import StoreFull

logger = logging.getLogger("topwork")

# Heartbeats in the time of a lease, so that one or two may fail.
_BEATS = 3.0
# Between looks for a request to cancel: the job has ended within five seconds of it.
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
    """Beats for the job in a thread of its own; a context manager. The methods are for the work's thread.

    recorded: why the job has ended, or was released, where that thread or `record` has recorded it.
    """

    def __init__(self, jobs: Jobs, claim: Claim, seconds: float, stopping: threading.Event) -> None:
        self.claim = claim
        self.recorded: Stopped | None = None
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
        """Raises Cancelled, DeadlinePassed, ShuttingDown, LeaseLost or what else ended the heartbeats."""
        if self._why is not None:
            raise self._why
        if self._stopping.is_set():
            raise ShuttingDown

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

    def record(self, why: Stopped) -> None:
        """Ends the job for this reason, or has another attempt begin where the worker ends.

        Raises LeaseLost, RegistryUnavailable, StoreFull.
        """
        if isinstance(why, ShuttingDown):
            self._jobs.release(self.claim)
        elif isinstance(why, Cancelled):
            self._jobs.cancelled(self.claim)
        else:
            self._jobs.fail(self.claim, "deadline_exceeded", "The job did not end in time.")
        self.recorded = why

    def _beat(self) -> None:
        reported: Mapping[str, Any] | None = None
        while not self._done.wait(min(self._seconds / _BEATS, _MOST_SECONDS)):
            progress = self._progress
            try:
                news = progress if progress is not reported else None
                heard = self._jobs.heartbeat(self.claim, self._seconds, news)
                reported = progress
                why = self._reason(heard)
                if why is not None:
                    # Recorded from here, for the work may not look for a long time.
                    self._why = why
                    self.record(why)
                    return
            except (RegistryUnavailable, StoreFull) as error:
                # While the lease lasts, another beat may get through; after it, the next one is refused.
                logger.warning("a heartbeat of the job %s failed: %s", self.claim.job.id, error)
            except Exception as error:
                # Without heartbeats the work has no right to go on.
                self._why = error
                return

    def _reason(self, heard: Heartbeat) -> Stopped | None:
        if heard.cancel_requested:
            return Cancelled()
        if heard.deadline_passed:
            return DeadlinePassed()
        return ShuttingDown() if self._stopping.is_set() else None


def checkpoint_path(scratch: Path, job_id: str) -> Path:
    """Where a job's work leaves what another attempt can go on with."""
    return scratch / f"{job_id}.safetensors"


def checkpoints(scratch: Path) -> list[Path]:
    """What any work has left, half written too; each name begins with its job's id and a dot."""
    return [path for form in ("*.safetensors", "*.partial") for path in scratch.glob(form)]
