"""Keeps a claimed job's lease while the job runs, and tells the work when to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from adapters.registry.errors import RegistryUnavailable
from adapters.registry.jobs import Jobs
from adapters.registry.records import Claim, Heartbeat
from adapters.storage.artifact import StoreFull

logger = logging.getLogger("topwork")

_BEATS = 3.0  # heartbeats per lease, so that one or two may fail
# Longest pause between heartbeats, in seconds. They also look for a request to cancel, which must end the
# job within five seconds.
_MOST_SECONDS = 2.0


class Stopped(Exception):
    """The work must end now, and publish nothing."""


class Cancelled(Stopped):
    """The tenant cancelled the job."""


class DeadlinePassed(Stopped):
    """The job passed its deadline."""


class ShuttingDown(Stopped):
    """The worker is ending; the job continues in another attempt."""


class Lease:
    """Sends a job's heartbeats from a background thread; a context manager.

    Call the methods from the thread that does the work. `recorded`: why the job has ended or was released,
    once `record` has written it; the background thread calls `record` too.
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
        """Raise the reason to stop, if there is one.

        It is Cancelled, DeadlinePassed, ShuttingDown, LeaseLost, or another error that ended the heartbeats.
        """
        if self._why is not None:
            raise self._why
        if self._stopping.is_set():
            raise ShuttingDown

    def report(self, share: float, progress: Mapping[str, Any]) -> None:
        """Set the progress that the next heartbeat sends, with the share done and the seconds left.

        `share`: share of the work that is done, 0 to 1. The seconds left are an estimate from the average
        speed of this attempt.
        """
        now = time.monotonic()
        if self._began is None:
            self._began = (now, share)
        since, done = now - self._began[0], share - self._began[1]
        left = round(since * (1.0 - share) / done, 1) if done > 0.0 else None
        self._progress = {**progress, "share": round(share, 4), "seconds_left": left}

    def tell(self) -> None:
        """Send the last reported progress now. Raises LeaseLost, RegistryUnavailable, StoreFull."""
        self._jobs.heartbeat(self.claim, self._seconds, self._progress)

    def record(self, why: Stopped) -> None:
        """End the job for this reason; ShuttingDown releases it to another attempt instead.

        Raises LeaseLost, RegistryUnavailable, StoreFull.
        """
        if isinstance(why, ShuttingDown):
            self._jobs.release(self.claim)
        elif isinstance(why, Cancelled):
            self._jobs.cancelled(self.claim)
        else:
            self._jobs.fail(self.claim, "deadline_exceeded", "The job did not end before its deadline.")
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
                    # The work may not call `check` for a long time, so this thread records the end.
                    self._why = why
                    self.record(why)
                    return
            except (RegistryUnavailable, StoreFull) as error:
                # A later heartbeat may succeed while the lease lasts; after that it raises LeaseLost.
                logger.warning("a heartbeat of the job %s failed: %s", self.claim.job.id, error)
            except Exception as error:
                # The lease runs out without heartbeats, so the work must stop.
                self._why = error
                return

    def _reason(self, heard: Heartbeat) -> Stopped | None:
        if heard.cancel_requested:
            return Cancelled()
        if heard.deadline_passed:
            return DeadlinePassed()
        return ShuttingDown() if self._stopping.is_set() else None


def checkpoint_path(scratch: Path, job_id: str) -> Path:
    """The file that another attempt of the job resumes from."""
    return scratch / f"{job_id}.safetensors"


def checkpoints(scratch: Path) -> list[Path]:
    """All checkpoint files, and the folders of partial ones. Each name begins with the job's id and a dot."""
    return [path for form in ("*.safetensors", "*.partial") for path in scratch.glob(form)]
