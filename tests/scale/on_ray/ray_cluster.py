"""A Ray cluster of several nodes on this machine, which asks for a token."""

from __future__ import annotations

import secrets
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.scale.on_ray.parts import Part, Supervisor

TOPWORK, RAY = (str(Path(sys.executable).with_name(name)) for name in ("topwork", "ray"))
ATTEMPT = b"ray::_Attempt"  # what Ray calls the process of an attempt
# Nodes and workers that have lost the head for longer end. Ray's default is a minute.
HEADLESS_SECONDS = 10


class RayCluster:
    """A head without a CPU, and nodes with one CPU each. They are started as the documents say."""

    def __init__(self, home: Path, supervisor: Supervisor, count: int) -> None:
        """`home`: a folder with a short path, for sockets."""
        self.port = free_port()
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEADLESS_SECONDS),
        }
        self._home = home
        self._supervisor = supervisor
        head = ("--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false")
        self.head = self._node("head", *head)
        node = (f"--address=127.0.0.1:{self.port}", "--num-cpus=1")
        self.nodes = [self._node(f"n{number}", *node) for number in range(1, count + 1)]

    def _node(self, name: str, *arguments: str) -> Part:
        command = [RAY, "start", *arguments, "--block", "--object-store-memory=100000000"]
        return self._supervisor.keep(Part(name, command, self._home, self.environment))

    def worker(self, home: Path, settings: Mapping[str, str]) -> Part:
        """A worker that has its jobs done on the nodes."""
        environment = {
            **self.environment,
            "TOPWORK_HOME": str(home),
            "TOPWORK_ENGINE": "ray",
            "TOPWORK_RAY_ADDRESS": f"127.0.0.1:{self.port}",
            **settings,
        }
        return Part("worker", [TOPWORK, "worker"], home, environment)

    def is_whole(self) -> bool:
        """Whether the head and all nodes have started once."""
        return all(b"Ray runtime started." in part.log.read_bytes() for part in (self.head, *self.nodes))

    def busy(self) -> list[Part]:
        """The nodes on which an attempt is under way."""
        return [
            node
            for node in self.nodes
            if any(command.startswith(ATTEMPT) for command in node.commands.values())
        ]


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
