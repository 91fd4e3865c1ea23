"""HAProxy with the shipped file, in front of replicas on this machine."""

from __future__ import annotations

import shutil
import signal
import socket
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from deploy.cluster.processes import NotInstalled, bound, launch

FILE = Path(__file__).resolve().parents[1] / "haproxy" / "haproxy.cfg"


class HAProxy:
    """A running HAProxy; a context manager. `url`: where clients connect. `metrics`: where its own are."""

    def __init__(
        self,
        replicas: Sequence[str],
        home: Path,
        *,
        port: int = 0,
        file: Path = FILE,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Returns once it takes connections and has found a replica. `replicas`: their URLs.

        Raises NotInstalled.
        """
        program = find_haproxy()
        address, metrics = (f"127.0.0.1:{one or _free_port()}" for one in (port, 0))
        self.url, self.metrics = f"http://{address}", f"http://{metrics}/metrics"
        log = home / "haproxy.log"
        names = {f"REPLICA_{number}": urlsplit(url).netloc for number, url in enumerate(replicas, 1)}
        self.process = launch(
            [*bound(), program, "-db", "-f", str(file)],
            log,
            {"BIND": address, "METRICS_BIND": metrics, **names, **(environment or {})},
        )
        end = time.monotonic() + 60
        while not _answers(f"http://{metrics}/readyz"):
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"HAProxy did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Let it answer the requests that it has, and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            self.process.wait(60)

    def __enter__(self) -> HAProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def find_haproxy() -> str:
    """The path of the program, which is not on every user's PATH. Raises NotInstalled."""
    found = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise NotInstalled("haproxy")
    return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5):
            return True
    except OSError:
        return False
