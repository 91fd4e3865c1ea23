"""Where attempts at jobs run: in the worker itself, or on other machines."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Protocol

from adapters.jobs.config import WorkerConfig
from adapters.jobs.runner import KINDS, JobRunner
from adapters.registry.records import Claim, JobKind
from adapters.workers.errors import RayMissing


class Place(Protocol):
    """Runs attempts. Whatever becomes of a place, only the lease decides on the outcome of a job."""

    def room(self) -> Collection[JobKind]:
        """Return the kinds of jobs of which one more attempt could begin now."""
        ...

    def begin(self, claim: Claim) -> None:
        """Begin the attempt. May return before it has ended."""
        ...


class Here:
    """Runs each attempt in the calling thread."""

    def __init__(self, runner: JobRunner) -> None:
        self._runner = runner

    def room(self) -> Collection[JobKind]:
        return KINDS

    def begin(self, claim: Claim) -> None:
        self._runner.run(claim)


@contextmanager
def place_for(config: WorkerConfig, runner: JobRunner) -> Iterator[Place]:
    """Open the place that the settings ask for; at the end, attempts that still run there are stopped.

    Raises RayMissing, RayUnusable.
    """
    if config.engine == "local":
        yield Here(runner)
        return
    # Importing ray takes a second, and it is an optional package.
    try:
        from adapters.workers.ray_place import open_ray
    except ModuleNotFoundError as error:
        raise RayMissing("TOPWORK_ENGINE=ray needs the package ray: pip install 'topwork[ray]'.") from error
    with open_ray(config, runner) as place:
        yield place
