"""Jobs on the nodes of a Ray cluster: whatever ends there, each job has one outcome."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.service_process import Serving
from tests.scale.ray_cluster import Nodes, driver, kill_attempt, nodes, run_worker
from tests.support.conditions import until
from tests.support.service.client import BLAME, PRAISE, Caller, Json
from tests.support.service.fine_tunes import LONG, QUICK, shades, until_finished
from tests.support.service.uploads import CSV
from tests.support.storage import new_bucket, new_schema

__all__ = ["nodes"]

pytestmark = pytest.mark.alone

EXAMPLES = 3_000
LEASE = 10.0
RESUMED = 5.0
FULL = os.environ.get("TOPWORK_TEST_SCALE") == "full"
TENANTS, KILLS = (20, 100) if FULL else (3, 2)
# The last test does a part of what these do.
in_full = pytest.mark.skipif(not FULL, reason="it takes a minute: make test-scale")


@dataclass(frozen=True, slots=True)
class Site:
    """A service that does no jobs, and what its workers need to reach the same database and bucket."""

    url: str
    home: Path
    settings: dict[str, str]
    callers: list[Caller] = field(default_factory=list)

    def node_of(self, nodes: Nodes, job: Json) -> Any:
        """The node on which the job's last attempt runs, as its driver says."""
        said = [
            line
            for line in (self.home / "driver.log").read_text().splitlines()
            if job["id"] in line and " on node " in line
        ]
        (found,) = [node for node in nodes.nodes if node.node_id in said[-1]]
        return found

    def caller(self) -> Caller:
        """A new tenant."""
        self.callers.append(Caller(self.url))
        return self.callers[-1]


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, postgres_server: str
) -> Iterator[Site]:
    options: dict[str, str] = {
        "endpoint": request.getfixturevalue("s3_server"),
        "region": "us-east-1",
        "access_key_id": "test",
        "secret_access_key": "test",
    }
    settings = {
        "TOPWORK_DATABASE_URL": new_schema(postgres_server),
        "TOPWORK_STORE_URL": new_bucket(options),
        "TOPWORK_STORE_OPTIONS": json.dumps(options),
        "TOPWORK_LEASE_SECONDS": str(LEASE),
    }
    home = tmp_path_factory.mktemp("site")
    with Serving(home, environment={**settings, "TOPWORK_WORKERS": "0"}) as serving:
        made = Site(serving.url, home, settings)
        yield made
        for caller in made.callers:
            caller.http.close()


def submit_upload(caller: Caller, adapter: str = "reviews") -> Json:
    kinds = (("up", PRAISE), ("down", BLAME))
    rows = [
        f'e{number},"{texts[number // 2 % len(texts)]} {number}",{label}'
        for number in range(EXAMPLES)
        for label, texts in (kinds[number % 2],)
    ]
    content = "\n".join(["id,text,label", *rows])
    response = caller.http.post(f"/adapt?adapter={adapter}", content=content, headers=CSV)
    assert response.status_code == 202, response.text
    job: Json = response.json()
    return job


def submit_fine_tune(caller: Caller, config: dict[str, Any], adapter: str = "shades") -> Json:
    return caller.adapt(adapter, shades(), 202, method="fine_tune", fine_tune=config)


def job_of(caller: Caller, job: Json) -> Json:
    return caller.call("GET", f"/jobs/{job['id']}")


def check_upload(caller: Caller, job: Json, adapter: str = "reviews") -> None:
    """One version, all examples, and an answer from it."""
    assert job["state"] == "succeeded", job
    assert [one["version"] for one in caller.call("GET", f"/adapters/{adapter}/versions")["versions"]] == [1]
    assert caller.call("GET", f"/adapters/{adapter}")["examples"] == EXAMPLES
    caller.predict(adapter, [{"text": PRAISE[0]}])


def stored(caller: Caller, job: Json) -> int:
    progress = job_of(caller, job)["progress"] or {}
    return int(progress.get("stored", 0))


@in_full
def test_jobs_are_done_on_the_nodes(site: Site, nodes: Nodes) -> None:
    caller = site.caller()
    with driver(site.home, nodes, site.settings):
        jobs = [submit_fine_tune(caller, QUICK), submit_upload(caller)]
        tuned, uploaded = (until_finished(caller, job, 400.0) for job in jobs)
    assert (tuned["state"], tuned["attempt"]) == ("succeeded", 1), tuned
    check_upload(caller, uploaded)


@in_full
def test_an_attempt_whose_node_is_killed_goes_on_elsewhere(site: Site, nodes: Nodes) -> None:
    caller = site.caller()
    with driver(site.home, nodes, site.settings):
        job = submit_upload(caller)
        until(lambda: stored(caller, job) >= 1_000, 60.0)
        nodes.kill(site.node_of(nodes, job))
        nodes.add()
        until(lambda: job_of(caller, job)["attempt"] == 2, LEASE + RESUMED)
        check_upload(caller, until_finished(caller, job))


@in_full
def test_an_attempt_goes_on_under_another_driver_when_its_own_is_killed(site: Site, nodes: Nodes) -> None:
    caller = site.caller()
    with driver(site.home, nodes, site.settings) as first:
        job = submit_upload(caller)
        until(lambda: stored(caller, job) >= 1_000, 60.0)
        first.kill()
        first.wait()
    with driver(site.home, nodes, site.settings):
        until(lambda: job_of(caller, job)["attempt"] == 2, LEASE + RESUMED)
        check_upload(caller, until_finished(caller, job))


def test_a_cancelled_job_ends_within_seconds_and_frees_its_node(site: Site, nodes: Nodes) -> None:
    caller = site.caller()
    with driver(site.home, nodes, site.settings) as worker:
        job = submit_fine_tune(caller, LONG)
        until(lambda: job_of(caller, job)["progress"] is not None, 60.0)
        caller.call("POST", f"/jobs/{job['id']}/cancel")
        until(lambda: job_of(caller, job)["state"] == "cancelled", 10.0)
        # One CPU a node: all find room at once only if the cancelled one has gone.
        others = [site.caller() for _ in nodes.nodes]
        jobs = [submit_upload(other) for other in others]
        for other, one in zip(others, jobs, strict=True):
            check_upload(other, until_finished(other, one))
    # Told to end, by the handler that Ray would replace.
    assert worker.returncode == 0


def test_a_request_for_what_no_node_has_fails_with_its_reason(site: Site, nodes: Nodes) -> None:
    caller = site.caller()
    wanting = {**site.settings, "TOPWORK_DEVICE": "cuda", "TOPWORK_RAY_PATIENCE": "3"}
    with driver(site.home, nodes, wanting):
        job = until_finished(caller, submit_fine_tune(caller, QUICK))
    assert (job["state"], job["error"]["code"]) == ("failed", "no_such_resources")
    assert "1 GPU" in job["error"]["detail"]


def test_a_cluster_without_a_token_is_refused(
    tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    done = run_worker(tmp_path, nodes)
    assert done.returncode == 1
    assert "RAY_AUTH_TOKEN" in done.stderr


def test_whatever_is_killed_each_job_has_one_outcome(site: Site, nodes: Nodes) -> None:
    """Nodes, processes of attempts and workers are killed while 20 tenants have a job each."""
    rng = random.Random(7)
    callers = [site.caller() for _ in range(TENANTS)]
    with ExitStack() as stack:
        drivers = [stack.enter_context(driver(site.home, nodes, site.settings)) for _ in range(2)]
        jobs = [(caller, submit_upload(caller)) for caller in callers]
        for number in range(KILLS):
            time.sleep(rng.uniform(2.0, 8.0))
            if all(job_of(caller, job)["finished_at"] for caller, job in jobs[-TENANTS:]):
                jobs += [(caller, submit_upload(caller, f"reviews-{number}")) for caller in callers]
            match rng.choice(["node", "attempt", "driver"]):
                case "node":
                    nodes.kill(rng.choice(nodes.nodes))
                    nodes.add()
                case "attempt":
                    kill_attempt(rng)
                case "driver":
                    drivers.pop(0).kill()
                    drivers.append(stack.enter_context(driver(site.home, nodes, site.settings)))
        for caller, job in jobs:
            ended = until_finished(caller, job, 600.0)
            if ended["state"] == "succeeded":
                check_upload(caller, ended, ended["adapter"])
            else:
                # Three kills of the processes of one job look like the job's own fault.
                assert ended["error"]["code"] == "attempts_exhausted", ended
                assert caller.call("GET", f"/adapters/{ended['adapter']}/versions")["versions"] == []
