"""Runs attempts on the nodes of a Ray cluster, each in an actor of its own.

Ray finds a place and moves nothing but claims. It retries nothing: the row of a job says which attempt
counts. An attempt whose node is lost is released. An attempt whose process ended by itself counts, as in a
worker of this machine. If this process ends, Ray ends its actors, and their leases run out.

Without a head, Ray's calls wait a minute and end the process, and a new head makes them end it at once. So
the head is looked at before Ray is asked.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError

from adapters.jobs.config import WorkerConfig
from adapters.jobs.lease import Lease, ShuttingDown
from adapters.jobs.runner import KINDS, JobRunner
from adapters.logs import configure_logging
from adapters.registry.records import AdapterRecord, Claim, JobKind, JobRecord
from adapters.workers.errors import NoSuchResources, RayUnusable

if TYPE_CHECKING:
    from adapters.jobs.bulk_attempt import AheadEmbedder
    from models.batching.batcher import Batcher

logger = logging.getLogger("topwork")

# Attempts whose actors Ray may be starting at the same time.
_MOST_STARTING = 8
# Seconds in which Ray notices that the node of a lost actor is lost too.
_NODE_SECONDS = 10.0
# Seconds that attempts get to end when this worker ends.
_END_SECONDS = 5.0
# Seconds that a starting worker waits for the head of the cluster.
_HEAD_SECONDS = 30.0
_HEAD_PAUSE = 5.0  # seconds between two looks for it
# Seconds in which a head accepts a connection.
_CONNECT_SECONDS = 5.0


class _Attempt:
    """Runs one attempt on a node: an actor with two threads, one of which can stop the other's work."""

    def __init__(self, config: WorkerConfig) -> None:
        configure_logging(config.log_format)
        scratch = Path(tempfile.gettempdir()) / f"topwork-jobs-{os.getuid()}"
        self._config = replace(config, scratch=str(scratch))
        self._stopping = threading.Event()

    def node(self) -> str:
        """Return the id of the node."""
        found: str = ray.get_runtime_context().get_node_id()
        return found

    def run(self, claim: Claim) -> None:
        """Run the attempt and record its outcome."""
        runner = JobRunner(self._config, self._stopping, spread=self._spread)
        try:
            runner.run(claim)
        finally:
            runner.close()

    def _spread(self, batcher: Batcher, adapter: AdapterRecord, job: JobRecord) -> AheadEmbedder:
        from adapters.workers.ray_embedder import RayEmbedder

        return RayEmbedder(self._config, batcher, adapter, job)

    def stop(self) -> None:
        """Release the job to another attempt, as soon as its work looks."""
        self._stopping.set()


@dataclass(slots=True)
class _Begun:
    """An attempt that Ray was asked to run. `lease`: held here until the attempt has its place."""

    claim: Claim
    actor: Any
    placed: Any
    since: float
    lease: Lease
    node: str | None = None
    ended: Any = None


class RayPlace:
    """Runs attempts in a Ray cluster. For one thread."""

    def __init__(self, config: WorkerConfig, runner: JobRunner, head: str) -> None:
        """`head`: address of the cluster's head."""
        self._config = config
        self._runner = runner
        self._patience = config.ray_patience
        self._head = head
        self._begun: list[_Begun] = []

    def room(self) -> Collection[JobKind]:
        """See Place. Raises RayUnusable if the cluster has lost its head."""
        if not _answers(self._head):
            raise RayUnusable(
                f"The head of the Ray cluster at {self._head} does not answer. "
                "The worker must be started again; its jobs go on."
            )
        for one in list(self._begun):
            self._look_after(one)
        starting = sum(one.node is None for one in self._begun)
        if starting >= _MOST_STARTING:
            return ()
        needed = self._config.ray_resources
        free = {
            name: amount - starting * needed.get(name, 0.0)
            for name, amount in ray.available_resources().items()
        }
        # An autoscaler adds a node only when something asks for its resources, so one attempt asks and waits.
        missing = not _offers(ray.cluster_resources(), needed)
        return KINDS if _offers(free, needed) or (missing and not starting) else ()

    def begin(self, claim: Claim) -> None:
        needed = self._config.ray_resources
        lease = Lease(self._runner.jobs, claim, self._config.lease_seconds, threading.Event())
        lease.__enter__()
        attempt = ray.remote(_Attempt).options(
            num_cpus=needed["CPU"],
            num_gpus=needed.get("GPU", 0.0),
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,
        )
        actor = attempt.remote(self._config)
        self._begun.append(_Begun(claim, actor, actor.node.remote(), time.monotonic(), lease))

    def close(self) -> None:
        """Stop the attempts, whose jobs go on elsewhere, and leave the cluster."""
        if not _answers(self._head):
            # The attempts go on until their nodes end.
            for one in list(self._begun):
                if one.node is None:
                    self._record(one, ShuttingDown())
            # Ray would wait for the head, or end this process by a signal.
            atexit.register(os._exit, 1)
            return
        for one in list(self._begun):
            if one.node is None:
                self._give_up(one, ShuttingDown())
            else:
                one.actor.stop.remote()
        running = [one.ended for one in self._begun if one.ended is not None]
        if running:
            ray.wait(running, num_returns=len(running), timeout=_END_SECONDS)
        ray.shutdown()

    def _look_after(self, one: _Begun) -> None:
        """Take note of what became of the attempt."""
        try:
            if one.node is None:
                self._look_for_place(one)
            elif ray.wait([one.ended], timeout=0)[0]:
                ray.get(one.ended)
                self._begun.remove(one)
        except RayActorError as error:
            self._lost(one, error)
        except RayError as error:
            logger.error("job %s: Ray failed: %s", one.claim.job.id, error)
            self._give_up(one, ShuttingDown())

    def _look_for_place(self, one: _Begun) -> None:
        if ray.wait([one.placed], timeout=0)[0]:
            one.node = ray.get(one.placed)
            job = one.claim.job
            logger.info("job %s of %s: attempt %d on node %s", job.id, job.adapter, job.attempt, one.node)
            # From now on, the attempt itself holds the lease.
            one.lease.__exit__(None, None, None)
            one.ended = one.actor.run.remote(one.claim)
            return
        try:
            one.lease.check()
        except Exception as why:
            self._give_up(one, why)
            return
        if time.monotonic() - one.since > self._patience:
            needed = ", ".join(f"{amount:g} {name}" for name, amount in self._config.ray_resources.items())
            self._give_up(
                one,
                NoSuchResources(
                    f"No node had {needed} free for {self._patience:g} s. The cluster has "
                    f"{_told(ray.cluster_resources())}. Add a node, or lower what a job asks for."
                ),
            )

    def _lost(self, one: _Begun, error: RayActorError) -> None:
        job = one.claim.job
        if one.node is None or _is_lost(one.node):
            logger.warning("job %s: its node is lost; another attempt goes on: %s", job.id, error)
            self._give_up(one, ShuttingDown())
            return
        # Perhaps the job ends its process, so the attempt counts. It ends when its lease does.
        logger.error("job %s: the process of its attempt %d ended: %s", job.id, job.attempt, error)
        self._begun.remove(one)

    def _give_up(self, one: _Begun, why: Exception) -> None:
        """Remove the attempt's actor, and record why it ends, unless it has lost its lease."""
        ray.kill(one.actor, no_restart=True)
        self._record(one, why)

    def _record(self, one: _Begun, why: Exception) -> None:
        if one.node is None:
            one.lease.__exit__(None, None, None)
        self._begun.remove(one)
        self._runner.give_up(one.lease, why)


def _offers(resources: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) >= amount for name, amount in needed.items())


def _told(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))


def _answers(head: str) -> bool:
    """Whether something accepts connections at the address."""
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _is_lost(node: str) -> bool:
    """Whether the node has left the cluster; waits until Ray had the time to notice."""
    end = time.monotonic() + _NODE_SECONDS
    while time.monotonic() < end:
        if not any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
            return True
        time.sleep(0.2)
    return False


@contextmanager
def open_ray(config: WorkerConfig, runner: JobRunner) -> Iterator[RayPlace]:
    """Join the cluster. At the end, stop what runs there for this process, and leave.

    For the main thread. Raises RayUnusable.
    """
    _await_head(config.ray_address)
    told_to_end = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=config.ray_address, namespace="topwork", log_to_driver=False, configure_logging=False
        )
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise RayUnusable(f"The Ray cluster at {config.ray_address} cannot be joined: {error}") from error
    # Ray has replaced it by one that exits at once.
    signal.signal(signal.SIGTERM, told_to_end)
    place = RayPlace(config, runner, ray.get_runtime_context().gcs_address)
    try:
        yield place
    except RayError as error:
        raise RayUnusable(f"The Ray cluster at {config.ray_address} cannot be used: {error}") from error
    finally:
        place.close()


def _await_head(address: str) -> None:
    """Return once the head answers. Raises RayUnusable."""
    if ":" not in address:
        return  # Ray looks for it.
    end = time.monotonic() + _HEAD_SECONDS
    while not _answers(address):
        if time.monotonic() > end:
            raise RayUnusable(f"No head of a Ray cluster answers at {address}.")
        logger.warning("no head of a Ray cluster answers at %s; waiting for it", address)
        time.sleep(_HEAD_PAUSE)
