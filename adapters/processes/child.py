"""Child processes of this service: their environment, their heartbeats and their end."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from adapters.processes.heartbeat import HeartbeatMonitor

logger = logging.getLogger("topwork")

_ROOT = str(Path(__file__).resolve().parents[2])


# Secrets of the service. A child process that needs one gets it on standard input.
_SECRETS = (
    "TOPWORK_ADMIN_KEY",
    "TOPWORK_CALLBACK_SECRETS",
    "TOPWORK_DATABASE_URL",
    "TOPWORK_STORE_OPTIONS",
    "PGPASSWORD",
)
# Prefixes of cloud credentials. A worker needs these to open a bucket.
_CLOUDS = ("AWS_", "AZURE_", "GOOGLE_")


def child_environment(*, clouds: bool = False) -> dict[str, str]:
    """Return this process's environment without secrets, and with our packages on PYTHONPATH.

    `clouds`: keep the cloud credentials, which are needed to open a bucket.
    """
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _SECRETS and (clouds or not name.startswith(_CLOUDS))
    }
    return {**kept, "PYTHONPATH": path}


class ChildProcess:
    """A process that runs one of our modules, reads its standard input and sends heartbeats. Blocking.

    Its first argument is the descriptor of the pipe for heartbeats: see start_heartbeat. It ends when its
    standard input closes, which also happens when this process is killed.
    """

    def __init__(
        self,
        name: str,
        module: str,
        *arguments: str,
        environment: Mapping[str, str],
        stdout: int | None = None,
    ) -> None:
        """Start the process. `name`: for the log. `stdout`: see subprocess.Popen. Raises OSError."""
        self._name = name
        self._monitor: HeartbeatMonitor | None = None
        reading, writing = os.pipe()
        self._heartbeats = os.fdopen(reading, "rb", buffering=0)
        os.set_blocking(reading, False)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(writing), *arguments],
                stdin=subprocess.PIPE,
                stdout=stdout,
                pass_fds=(writing,),
                env=environment,
            )
        except OSError:
            self._heartbeats.close()
            raise
        finally:
            os.close(writing)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, None while the process runs."""
        return self._process.poll()

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """The output, if it was asked for as a pipe."""
        assert self._process.stdout is not None
        return self._process.stdout

    def kill_if_silent(self) -> None:
        """Kill the process if its heartbeats have stopped. Call this every LOOK_SECONDS, from one thread.

        The time until the first heartbeat is not limited.
        """
        if self._heartbeats.read(4096):
            self._monitor = self._monitor or HeartbeatMonitor(self.pid)
            self._monitor.beat()
        if self._monitor is not None and (silent := self._monitor.look()) is not None:
            logger.warning("the %s was silent for %.1f s, and is replaced", self._name, silent)
            self.kill()

    def kill(self) -> None:
        """Kill the process, without waiting for its end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def wait(self) -> None:
        """Wait until the process has ended."""
        self._process.wait()

    def end(self, patience: float = 0.0) -> None:
        """End the process and close its pipes. A second call does nothing.

        `patience`: seconds that it gets to end by itself, after its standard input has closed.
        """
        if patience:
            self._close(self.stdin)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self.kill()
        self.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._heartbeats):
            if pipe is not None:
                self._close(pipe)

    @staticmethod
    def _close(pipe: IO[bytes]) -> None:
        # Closing flushes, which fails if the process has gone.
        with contextlib.suppress(OSError):
            pipe.close()
