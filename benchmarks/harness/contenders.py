"""The contenders: the service, the bare loop, and servers that a team would run instead.

Each is a process of its own on the same machine. Whoever is not being measured is stopped (SIGSTOP), so that
nobody's polling takes a core from another.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from benchmarks.harness import bare_loop
from benchmarks.harness.service_process import ROOT

_PATIENCE = 300.0


class DidNotAnswer(RuntimeError):
    """A contender ended, or was never ready; what it wrote is in the message."""


class BareLoop:
    """The bare loop over some inputs; a context manager. `best`: the fastest of bare.WAYS, once sought."""

    def __init__(self, backbone: str, inputs: Sequence[bytes | str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="topwork-bare-")
        self.count = len(inputs)
        for index, one in enumerate(inputs):
            content = one if isinstance(one, bytes) else one.encode()
            Path(self._folder.name, f"{index:05}").write_bytes(content)
        command = [sys.executable, "-m", "benchmarks.harness.bare_loop", backbone, self._folder.name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.best = next(iter(bare_loop.WAYS))
        self._answer()

    def seconds(self, way: str, times: int = 1) -> float:
        """Seconds for all inputs, this number of times over."""
        return float(self._answer(f"run {times} {way}"))

    def each(self, way: str, times: int) -> list[float]:
        """Seconds of every input alone."""
        found: list[float] = json.loads(self._answer(f"each {times} {way}"))
        return found

    def seek(self, rounds: int = 3) -> dict[str, float]:
        """Inputs a second of every way, the best of some rounds; the fastest becomes `best`."""
        rates = {way: self.count / min(self.seconds(way) for _ in range(rounds)) for way in bare_loop.WAYS}
        self.best = max(rates, key=lambda way: rates[way])
        return rates

    def _answer(self, question: str | None = None) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if question is not None:
            print(question, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise DidNotAnswer("the bare loop ended; its error is above")
        return line.strip()

    def __enter__(self) -> BareLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.close()
        self._folder.cleanup()


class Peer:
    """Another project's server in its own process group; a context manager. `url` is where it answers."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """{port} in the command is a free port. Raises DidNotAnswer."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by _end)
        self.process = subprocess.Popen(
            [part.format(port=port) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError):
                try:
                    urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                except urllib.error.HTTPError as answer:
                    if answer.code == 503:  # it listens, and its model is not loaded yet
                        raise OSError("not ready") from answer
                return
            time.sleep(0.2)
        self._log.seek(0)
        written = self._log.read()[-4000:]
        self._end()
        raise DidNotAnswer(written)

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


@contextlib.contextmanager
def only(groups: dict[str, int], name: str) -> Iterator[None]:
    """Lets the named one run, and stops the other process groups meanwhile."""
    others = [group for other, group in groups.items() if other != name]
    for group in others:
        os.killpg(group, signal.SIGSTOP)
    try:
        yield
    finally:
        for group in others:
            os.killpg(group, signal.SIGCONT)
