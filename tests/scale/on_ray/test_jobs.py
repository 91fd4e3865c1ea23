"""Jobs on the nodes of a Ray cluster: where they run, and how they end."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.scale.on_ray.ray_cluster import TOPWORK
from tests.scale.on_ray.site import Site
from tests.support.conditions import until
from tests.support.service.fine_tunes import LONG, QUICK

pytestmark = pytest.mark.alone


def test_a_cancelled_job_ends_within_seconds_and_frees_its_node(site: Site) -> None:
    tenant = site.tenant()
    with site.worker():
        job = tenant.fine_tune(LONG)
        until(lambda: tenant.job(job)["progress"] is not None, pause=0.2)
        tenant.ask("POST", f"/jobs/{job['id']}/cancel")
        until(lambda: tenant.job(job)["state"] == "cancelled", 10.0)
        # One CPU a node: all find room at once only if the cancelled one has gone.
        jobs = [(other, other.upload()) for other in (site.tenant() for _ in site.cluster.nodes)]
        until(lambda: all(other.job(one)["attempt"] for other, one in jobs), pause=0.2)
        for other, one in jobs:
            other.check(other.until_ended(one))


def test_a_worker_that_ends_releases_the_jobs_that_it_has_begun(site: Site) -> None:
    tenants = [site.tenant() for _ in site.cluster.nodes]
    jobs = [(tenant, tenant.upload()) for tenant in tenants]
    with site.worker() as worker:
        until(lambda: all(tenant.job(job)["attempt"] for tenant, job in jobs))
        assert worker.end() == 0
    assert [tenant.job(job)["state"] for tenant, job in jobs] == ["queued"] * len(jobs)
    for tenant, job in jobs:
        tenant.ask("POST", f"/jobs/{job['id']}/cancel")


def test_a_request_for_what_no_node_has_fails_with_its_reason(site: Site) -> None:
    tenant = site.tenant()
    with site.worker(TOPWORK_DEVICE="cuda", TOPWORK_RAY_PATIENCE="3"):
        job = tenant.until_ended(tenant.fine_tune(QUICK))
    assert (job["state"], job["error"]["code"]) == ("failed", "no_such_resources")
    assert "1 GPU" in job["error"]["detail"]


def test_a_cluster_without_a_token_is_refused(site: Site) -> None:
    environment = {**os.environ, **site.settings, "TOPWORK_ENGINE": "ray", "TOPWORK_HOME": str(site.home)}
    done = subprocess.run([TOPWORK, "worker"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "RAY_AUTH_TOKEN" in done.stderr
