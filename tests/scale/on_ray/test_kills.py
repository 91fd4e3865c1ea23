"""Whatever ends or stops in a cluster, each acknowledged job goes on and has one outcome."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime

import pytest

from tests.scale.on_ray.harms import HARMS
from tests.scale.on_ray.ray_cluster import HEADLESS_SECONDS
from tests.scale.on_ray.site import FULL, LEASE, RESUMED, Site
from tests.scale.on_ray.tenant import Tenant
from tests.support.conditions import until
from tests.support.service.client import Json
from tests.support.service.fine_tunes import QUICK

pytestmark = pytest.mark.alone

TENANTS, KILLS = (20, 100) if FULL else (2, 4)
WORKERS = 2
# Jobs end between two kills, or hardly any would end before its third attempt.
PAUSE = (2.0, 12.0) if FULL else (0.5, 3.0)
# These end the attempt; the others may only delay it.
ENDING = ("head", "node", "raylet", "attempt", "worker", "freeze")


@pytest.mark.skipif(not FULL, reason="the last test does a part of it: make test-scale")
@pytest.mark.parametrize("name", HARMS)
def test_a_job_goes_on_within_its_lease_and_five_seconds(name: str, site: Site) -> None:
    tenant = site.tenant()
    with site.kept_worker():
        job = tenant.upload()
        until(lambda: tenant.stored(job) >= 1_000, pause=0.2)
        HARMS[name](site, site.node_of(job))
        if name not in ENDING:
            site.until_repaired()
        before = tenant.job(job)

        def has_gone_on() -> bool:
            now = tenant.job(job)
            if name in ENDING:
                # Nodes work on for a while without a head, perhaps to the end of the job.
                return bool(now["attempt"] == 2 or (name == "head" and now["state"] == "succeeded"))
            return any(now[key] != before[key] for key in ("attempt", "progress"))

        until(has_gone_on, LEASE + RESUMED + (HEADLESS_SECONDS if name == "head" else 0), pause=0.2)
        site.until_repaired()
        ended = tenant.until_ended(job)
        # An attempt that was frozen ends too.
        until(lambda: not site.cluster.busy(), pause=0.5)
        tenant.check(ended)


def test_a_worker_ends_when_the_head_does_and_the_next_one_waits_for_a_head(site: Site) -> None:
    tenant = site.tenant()
    with site.worker() as first:
        job = tenant.upload()
        until(lambda: tenant.job(job)["progress"] is not None, pause=0.2)
        said = first.log.stat().st_size
        site.supervisor.release(site.cluster.head)
        site.cluster.head.kill()
        assert first.process.wait(20.0) == 1
    lines = first.log.read_bytes()[said:].decode().splitlines()
    assert [line for line in lines if line.startswith("topwork: ")] == lines[-1:]
    assert "The head of the Ray cluster" in lines[-1]
    assert "Traceback" not in "\n".join(lines)
    with site.worker() as second:
        until(lambda: b"no head" in second.log.read_bytes()[said:], 30.0)
        site.supervisor.keep(site.cluster.head)
        tenant.check(tenant.until_ended(job))


def test_whatever_is_killed_each_job_has_one_outcome(site: Site) -> None:
    """Each kind of harm in turn, while each tenant has a job."""
    rng = random.Random(7)
    tenants = [site.tenant() for _ in range(TENANTS)]
    jobs: list[tuple[Tenant, Json]] = []
    with ExitStack() as stack:
        for _ in range(WORKERS):
            stack.enter_context(site.kept_worker())
        for number in range(KILLS):
            while not (busy := site.cluster.busy()):
                if all(tenant.job(job)["finished_at"] for tenant, job in jobs[-TENANTS:]):
                    jobs += submitted(tenants, f"a{number}")
                time.sleep(0.5)
            time.sleep(rng.uniform(*PAUSE))
            name = list(HARMS)[number % len(HARMS)]
            HARMS[name](site, rng.choice(busy))
            print(f"{datetime.now(UTC):%H:%M:%S} {name}")
        site.until_repaired()
        ended = [(tenant, tenant.until_ended(job, 900.0)) for tenant, job in jobs]
    done = [job["state"] for _, job in ended].count("succeeded")
    assert 2 * done > len(ended), f"{done} of {len(ended)} jobs succeeded"
    for tenant, job in ended:
        if job["state"] == "succeeded":
            tenant.check(job)
        else:
            # Three attempts whose processes end look like the job's own fault.
            assert job["error"]["code"] == "attempts_exhausted", job
            assert tenant.versions(job["adapter"]) == []
    print(Counter((job["kind"], job["state"], job["attempt"]) for _, job in ended))


def submitted(tenants: list[Tenant], adapter: str) -> Iterator[tuple[Tenant, Json]]:
    """A job for each tenant. Every third tunes a network, the others learn from an upload."""
    for number, tenant in enumerate(tenants):
        yield tenant, tenant.fine_tune(QUICK, adapter) if number % 3 == 2 else tenant.upload(adapter)
