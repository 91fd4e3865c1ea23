"""Runs the service as a user does, in processes of its own, and takes it down again or kills it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
READY = "Topwork is ready at "


class DidNotStart(RuntimeError):
    """The service ended before it was ready; the message is what it wrote."""


def resident(pid: int, field: str = "VmRSS") -> int:
    """Bytes of a process's resident memory; with VmHWM, of the most that it ever was."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


class Serving:
    """A running `topwork serve` with a home folder of its own; a context manager.

    `url` is where it answers, `process` the process itself, `seconds_to_ready` from its start to its own
    word that it is ready, `log` the path of what it wrote.
    """

    def __init__(
        self,
        home: Path,
        *,
        arguments: Sequence[str] = ("--port", "0"),
        environment: Mapping[str, str] | None = None,
        timeout: float = 600.0,
        launcher: Sequence[str] = (),
    ) -> None:
        """Returns once the service is ready. `launcher`: a command that runs it. Raises DidNotStart."""
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.log = home / "serve.log"
        self._lines: list[str] = []
        script = Path(sys.executable).with_name("topwork")
        # There is no script where the packages are unpacked into a folder.
        program = [str(script)] if script.exists() else [sys.executable, "-m", "service.cli"]
        begun = time.perf_counter()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*launcher, *program, "serve", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "TOPWORK_HOME": str(home), **(environment or {})},
            )
        assert self.process.stdout is not None
        found = threading.Event()
        reader = threading.Thread(target=self._read, args=(self.process.stdout, found), daemon=True)
        reader.start()
        found.wait(timeout)
        self.seconds_to_ready = time.perf_counter() - begun
        ready = [line for line in self._lines if line.startswith(READY)]
        if not ready:
            self.kill()
            raise DidNotStart(self.log.read_text(errors="replace")[-4000:])
        self.url = ready[0].removeprefix(READY).strip()

    def _read(self, stream: IO[str], found: threading.Event) -> None:
        with stream:
            for line in stream:
                self._lines.append(line)
                if line.startswith(READY):
                    found.set()
        found.set()

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the serving process alone."""
        return resident(self.process.pid)

    def group(self) -> list[int]:
        """The process ids of the service and of everything that it started and is still there."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[2]) == self.process.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def stop(self, timeout: float = 30.0) -> int:
        """Asks it to end, as Ctrl-C and an orchestrator do;

        Its exit status. Raises subprocess.TimeoutExpired.
        """
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """kill -9 of the serving process, and of nothing else: what it started must find out by itself."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Serving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()
