"""Starts the worker process beside the service, and restarts it when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from dataclasses import asdict

from adapters.jobs.config import WorkerConfig
from adapters.processes.child import ChildProcess, child_environment
from adapters.processes.heartbeat import LOOK_SECONDS

logger = logging.getLogger("topwork")

# Seconds that the worker gets to stop its job before it is killed; another attempt continues the job.
_PATIENCE = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before a restart; doubled each time


class WorkerSupervisor:
    """Keeps one worker process running. For one event loop.

    The worker's standard input closes with this process, which ends the worker. `replaced`: number of
    restarts, after a worker that ended or was killed because it was silent.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.replaced = 0
        self._config = config
        self._process: ChildProcess | None = None
        self._monitor: asyncio.Task[None] | None = None
        self._ending = threading.Event()

    @property
    def alive(self) -> bool:
        """Whether the worker runs or is about to be restarted."""
        return self._monitor is not None and not self._monitor.done()

    @property
    def pid(self) -> int | None:
        """The process id of the current or last worker, None before the first."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the worker in the background, without waiting for it."""
        self._monitor = asyncio.create_task(self._watch(), name="worker")

    def end(self) -> None:
        """Stop restarting the worker: it may have been told to end as well."""
        self._ending.set()

    async def close(self) -> None:
        """End the worker; its job continues in another attempt."""
        if self._monitor is not None:
            self._monitor.cancel()
            await asyncio.wait([self._monitor])
        if self._process is not None:
            await asyncio.to_thread(self._process.end, _PATIENCE)

    async def _watch(self) -> None:
        pause = _FIRST_PAUSE
        while not self._ending.is_set():
            begun = time.monotonic()
            try:
                status = await self._run()
            except OSError as error:
                status = -1
                logger.warning("the worker cannot be started: %s", error)
            if self._ending.is_set():
                return
            if time.monotonic() - begun > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            logger.warning("the worker ended with %d; it is started again in %.1f s", status, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            self.replaced += 1

    async def _run(self) -> int:
        """Start a worker, kill it once its heartbeats stop, and return its exit status."""
        process = self._process = ChildProcess(
            "worker", "adapters.workers.worker", environment=child_environment(clouds=True)
        )
        # The line fits into the pipe, so that writing it does not wait for the worker.
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(asdict(self._config)).encode() + b"\n")
            process.stdin.flush()
        while (status := process.poll()) is None:
            await asyncio.sleep(LOOK_SECONDS)
            process.kill_if_silent()
        process.end()
        return status
