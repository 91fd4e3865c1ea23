"""`python -m adapters.workers.worker`: claims jobs and runs them, one at a time, in a niced process.

The settings come as one line of JSON on standard input, since a database URL may hold a password and process
lists show arguments. The worker ends when its standard input closes, which also happens when its parent is
killed.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from concurrent.futures import Executor
from typing import IO

from adapters.jobs.config import WorkerConfig
from adapters.jobs.runner import RETRY_SECONDS, JobRunner
from adapters.logs import configure_logging
from adapters.processes.heartbeat import start_heartbeat
from adapters.registry.errors import RegistryUnavailable
from adapters.storage.artifact import StoreFull, StoreUnavailable
from adapters.workers.place import Place, place_for
from models.priority import give_way_but_for_commits

logger = logging.getLogger("topwork")


class Worker:
    """Claims jobs and has them run in a place, until `stopping` is set."""

    def __init__(
        self, runner: JobRunner, place: Place, stopping: threading.Event, poll_seconds: float
    ) -> None:
        self._runner = runner
        self._place = place
        self._stopping = stopping
        self._poll_seconds = poll_seconds

    def run(self) -> None:
        """Run jobs; return once `stopping` is set."""
        while not self._stopping.is_set():
            try:
                claim = self._runner.claim(self._place.room())
            except (RegistryUnavailable, StoreFull, StoreUnavailable) as error:
                logger.warning("no job can be claimed: %s", error)
                self._stopping.wait(RETRY_SECONDS)
                continue
            if claim is None:
                self._runner.tidy()
                self._stopping.wait(self._poll_seconds)
            else:
                self._place.begin(claim)


def _end_with(pipe: IO[str], stopping: threading.Event) -> None:
    """Set `stopping` when the pipe closes, which means that the parent process has gone."""

    def wait() -> None:
        pipe.read()
        stopping.set()

    threading.Thread(target=wait, name="parent", daemon=True).start()


def work(config: WorkerConfig, stopping: threading.Event, writer: Executor | None = None) -> None:
    """Run jobs until `stopping` is set. `writer`: see Registry."""
    runner = JobRunner(config, stopping, writer)
    try:
        with place_for(config, runner) as place:
            Worker(runner, place, stopping, config.poll_seconds).run()
    finally:
        runner.close()


def main() -> None:
    """Run jobs at low priority until standard input closes.

    The first argument, if given, is the file descriptor of the pipe for heartbeats.
    """
    writer = give_way_but_for_commits()
    if len(sys.argv) > 1:
        start_heartbeat(int(sys.argv[1]))
    stopping = threading.Event()
    # The parent decides when the worker ends. Ctrl-C in a terminal reaches every process, and SIGTERM from
    # BentoML's supervisor or systemd may as well.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = WorkerConfig(**json.loads(sys.stdin.readline()))
    configure_logging(config.log_format)
    _end_with(sys.stdin, stopping)
    work(config, stopping, writer)


if __name__ == "__main__":
    main()
