"""One service with its database, its bucket and a Ray cluster, for all of these tests."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from benchmarks.harness.bucket_process import BucketProcess
from deploy.cluster.postgres import Postgres
from deploy.cluster.processes import NotInstalled
from tests.scale.on_ray.parts import Supervisor
from tests.scale.on_ray.site import Site
from tests.support.storage import unavailable


@pytest.fixture(scope="package")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Its logs stay if a test fails."""
    for package, component in (("ray", "ray"), ("moto", "s3")):
        if importlib.util.find_spec(package) is None:
            unavailable(component, f"{package} is not installed")
    # Ray's sockets need short paths.
    home = Path(tempfile.mkdtemp(prefix="ray-"))
    with ExitStack() as stack:
        try:
            database = stack.enter_context(Postgres("max_connections=200", sync=False))
        except NotInstalled as error:
            unavailable("postgres", f"{error} is not installed")
        bucket = stack.enter_context(BucketProcess())
        supervisor = stack.enter_context(Supervisor())
        with closing(Site(home, supervisor, database, bucket)) as found:
            yield found
    if not request.session.testsfailed:
        shutil.rmtree(home)
