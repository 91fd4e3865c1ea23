"""A Ray cluster of several nodes on this machine, which asks for a token, and workers that use it."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.storage import unavailable

TOPWORK = Path(sys.executable).with_name("topwork")


class Nodes:
    """A head without a CPU, and nodes with one CPU each, which can be killed and replaced."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        quiet = {"num_cpus": 0, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=quiet)
        self.nodes: list[Any] = []
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> None:
        """One more node."""
        self.nodes.append(self._cluster.add_node(num_cpus=1))

    def kill(self, node: Any) -> None:
        """kill -9 of everything of the node, as if its machine were switched off."""
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two nodes and a head. Their processes and those of this test have a token."""
    token = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    before = dict(os.environ)
    # Ray reads its variables when it is imported.
    os.environ.update(token)
    try:
        import ray  # noqa: F401
    except ImportError as error:
        unavailable("ray", str(error))
    cluster = Nodes(2)
    try:
        yield cluster
    finally:
        cluster.close()
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def driver(home: Path, nodes: Nodes, settings: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that has its jobs done on the nodes."""
    with (home / "driver.log").open("ab") as log:
        environment = _environment(home, nodes, settings)
        process = subprocess.Popen([TOPWORK, "worker"], env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)


def kill_attempt(rng: random.Random) -> None:
    """kill -9 of the process of one attempt, if there is one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if (entry / "cmdline").read_bytes().startswith(b"ray::_Attempt"):
                    found.append(int(entry.name))
    if found:
        with suppress(ProcessLookupError):
            os.kill(rng.choice(sorted(found)), signal.SIGKILL)


def run_worker(home: Path, nodes: Nodes) -> subprocess.CompletedProcess[str]:
    """A worker that ends by itself."""
    return subprocess.run(
        [TOPWORK, "worker"], env=_environment(home, nodes, {}), capture_output=True, text=True, timeout=120
    )


def _environment(home: Path, nodes: Nodes, settings: Mapping[str, str]) -> dict[str, str]:
    own = {"TOPWORK_HOME": str(home), "TOPWORK_ENGINE": "ray", "TOPWORK_RAY_ADDRESS": nodes.address}
    return {**os.environ, **settings, **own}
