"""Programs of a cluster on this machine, and a supervisor that starts them again, as Kubernetes would."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from deploy.cluster.processes import bound, launch

_LOOK_SECONDS = 0.2


class Part:
    """A program, with all processes that it starts. Each start has an empty folder for temporary files."""

    def __init__(self, name: str, command: Sequence[str], home: Path, environment: Mapping[str, str]) -> None:
        """`home`: the folder of the log, and of the temporary files."""
        self.log = home / f"{name}.log"
        self._home = home
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started last."""
        assert self._process is not None
        return self._process

    @property
    def has_ended(self) -> bool:
        """Whether it must be started, for the first time or again."""
        return self._process is None or self._process.poll() is not None

    @property
    def down_seconds(self) -> float:
        """For how long it stays down after it has ended."""
        return 0.0 if self._process is None else 1.0

    @property
    def commands(self) -> dict[int, bytes]:
        """The command lines of its living processes, which are those of its session, by their ids."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                    if int(session) == self.process.pid and state != "Z":
                        found[int(entry.name)] = (entry / "cmdline").read_bytes()
        return found

    def start(self) -> None:
        """Start it, and end what is left of it. It ends with the calling thread."""
        self.kill()
        folder = tempfile.mkdtemp(prefix="", dir=self._home)
        self._process = launch([*bound(), *self._command], self.log, {**self._environment, "TMPDIR": folder})

    def kill(self) -> None:
        """kill -9 of all its processes, as if its machine were switched off."""
        if self._process is not None:
            while self._signal(signal.SIGKILL):
                pass
            self._process.wait()

    def freeze(self) -> None:
        """Stop all its processes."""
        # A process may have started another while the first ones stopped.
        self._signal(signal.SIGSTOP)
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the stopped processes go on."""
        self._signal(signal.SIGCONT)

    def end(self, timeout: float = 60.0) -> int:
        """Ask it to end, as Ctrl-C and an orchestrator do; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def _signal(self, sign: signal.Signals) -> bool:
        """Whether there were processes to send it to."""
        pids = list(self.commands)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        return bool(pids)


class Supervisor:
    """Starts parts, and each again after it has ended; a context manager, which kills them."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._ending = threading.Event()
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def keep(self, part: Part) -> Part:
        """Start it soon, and again whenever it ends."""
        with self._turn:
            self._parts.append(part)
        return part

    def release(self, part: Part) -> None:
        """Leave it as it is."""
        with self._turn:
            self._parts.remove(part)

    def _watch(self) -> None:
        ended_at: dict[Part, float] = {}
        while not self._ending.wait(_LOOK_SECONDS):
            with self._turn:
                for part in self._parts:
                    now = time.monotonic()
                    if part.has_ended and now >= ended_at.setdefault(part, now) + part.down_seconds:
                        part.start()
                        del ended_at[part]
        for part in self._parts:
            part.kill()

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
