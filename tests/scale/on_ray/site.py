"""A service with a database, a bucket and a Ray cluster, and tenants that have jobs there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import httpx

from benchmarks.harness.bucket_process import BucketProcess
from deploy.cluster.postgres import Postgres
from tests.scale.on_ray.parts import Part, Supervisor
from tests.scale.on_ray.ray_cluster import TOPWORK, RayCluster, free_port
from tests.scale.on_ray.tenant import Tenant
from tests.support.conditions import until
from tests.support.service.client import Json

LEASE = 10.0
RESUMED = 5.0
FULL = os.environ.get("TOPWORK_TEST_SCALE") == "full"
NODES = 3 if FULL else 2


class Site:
    """A running service that does no jobs; what it runs on; and its tenants."""

    def __init__(self, home: Path, supervisor: Supervisor, database: Postgres, bucket: BucketProcess) -> None:
        self.home = home
        self.supervisor = supervisor
        self.database = database
        self.bucket = bucket
        self.cluster = RayCluster(home, supervisor, NODES)
        self.settings = {
            **bucket.environment,
            "TOPWORK_DATABASE_URL": database.url,
            "TOPWORK_LEASE_SECONDS": str(LEASE),
        }
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {**self.settings, "TOPWORK_HOME": str(home), "TOPWORK_WORKERS": "0"}
        command = [TOPWORK, "serve", "--port", str(port)]
        self.service = supervisor.keep(Part("service", command, home, environment))
        self.workers: list[Part] = []
        self._timers: list[Timer] = []
        self._tenants: list[Tenant] = []
        self.until_ready()

    def until_ready(self) -> None:
        """Return once the service takes requests, and the cluster has its nodes."""
        until(lambda: self._is_ready() and self.cluster.is_whole(), 600.0, pause=0.2)

    def later(self, seconds: float, repair: Callable[[], None]) -> None:
        """Have something repaired."""
        self._timers.append(Timer(seconds, repair))
        self._timers[-1].start()

    def until_repaired(self) -> None:
        """Return once all repairs are done."""
        while self._timers:
            self._timers.pop().join()

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz").is_success
        except httpx.TransportError:
            return False

    def tenant(self) -> Tenant:
        """A new one."""
        self._tenants.append(Tenant(self.url))
        return self._tenants[-1]

    def close(self) -> None:
        """Do the repairs, and close the tenants' connections."""
        self.until_repaired()
        for tenant in self._tenants:
            tenant.http.close()

    @contextmanager
    def worker(self, **settings: str) -> Iterator[Part]:
        """Run a worker whose jobs are done on the nodes. Nothing starts it again."""
        part = self.cluster.worker(self.home, {**self.settings, **settings})
        part.start()
        try:
            yield part
        finally:
            if not part.has_ended:
                part.end()

    @contextmanager
    def kept_worker(self) -> Iterator[Part]:
        """A worker that is started again whenever it ends."""
        part = self.supervisor.keep(self.cluster.worker(self.home, self.settings))
        self.workers.append(part)
        try:
            yield part
        finally:
            self.workers.remove(part)
            self.supervisor.release(part)
            part.kill()

    def node_of(self, job: Json) -> Part:
        """The node on which the job's last attempt runs, as its worker says."""
        lines = (self.home / "worker.log").read_text().splitlines()
        last = [line for line in lines if job["id"] in line and " on node " in line][-1]
        (found,) = [
            node
            for node in self.cluster.nodes
            for command in node.commands.values()
            for part in command.split(b"\0")
            if part.startswith(b"--node_id=") and part[10:].decode() in last
        ]
        return found
