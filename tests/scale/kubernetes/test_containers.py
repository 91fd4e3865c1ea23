"""The containers of the manifests as processes, on a real database and bucket: see pods.py for what differs.

TOPWORK_TEST_SCALE=full runs the Ray overlay too.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CalledProcessError

import httpx
import pytest
from sqlalchemy import make_url

from benchmarks.harness.service_process import ROOT
from deploy.cluster.bucket import S3Server, make_bucket, store_options
from deploy.cluster.processes import NotInstalled
from deploy.cluster.proxy import find_haproxy
from tests.scale.kubernetes.manifests import containers, render
from tests.scale.kubernetes.network import GATEWAY, Network
from tests.scale.kubernetes.pods import Cluster, Pod
from tests.support.conditions import until
from tests.support.dockerfile import STORE_FOLDERS
from tests.support.models import tiny_backbones
from tests.support.service.calls import KEY
from tests.support.service.client import Caller, Json
from tests.support.service.fine_tunes import until_finished
from tests.support.service.uploads import CSV
from tests.support.storage import new_schema, unavailable

pytestmark = pytest.mark.alone

FULL = os.environ.get("TOPWORK_TEST_SCALE") == "full"
HTTP, METRICS = 3000, 8404
# Examples of an upload that one process embeds, and of one that several Ray nodes embed.
SPREAD = 5_000
# A worker takes 20 seconds for them on fast cores, longer than its pod takes to end.
EXAMPLES = 40_000
TEXTS = [tiny_backbones.sentence(seed) for seed in range(8)]
# Variables of the image, whose model store is bound to a folder of the tests.
STORE = "/home/bentoml/bento"
IMAGE = {"HOME": "/home/bentoml", "BENTOML_HOME": STORE, "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8"}


@dataclass
class Site:
    """A cluster, and one tenant."""

    cluster: Cluster
    pods: dict[str, list[Pod]] = field(default_factory=dict)

    def start(self, deployment: str) -> Pod:
        pod = self.cluster.start(deployment)
        self.pods.setdefault(deployment, []).append(pod)
        return pod

    @contextmanager
    def caller(self, pod: Pod) -> Iterator[Caller]:
        """A caller of a pod's HTTP port."""
        caller = Caller(f"http://{pod.address}:{HTTP}", "acme")
        caller.http.headers["Authorization"] = f"Bearer {KEY}"
        with caller.http:
            yield caller


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """What these tests do is in a network of its own, which no proxy reaches."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)
        try:
            made = Network()
        except (OSError, CalledProcessError) as error:
            unavailable("namespaces", str(error))
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def bucket(network: Network) -> Iterator[dict[str, str]]:
    """The options of an S3 server in the network."""
    with S3Server(GATEWAY) as server:
        yield store_options(server.url)


@contextmanager
def running(
    overlay: str, network: Network, bucket: dict[str, str], postgres_server: str, folder: Path
) -> Iterator[Site]:
    """A cluster with the resources of an overlay and a database of its own, without pods."""
    try:
        find_haproxy()
    except NotInstalled as error:
        unavailable("haproxy", f"{error} is not installed")
    resources = render(overlay)
    (folder / "store").mkdir()
    _, text = tiny_backbones.install(folder / "bentoml", measured=True)
    # The image has the models and these folders in it.
    (folder / "bentoml" / "models").rename(folder / "store" / "models")
    for name in STORE_FOLDERS:
        (folder / "store" / name).mkdir()
    database = new_schema(postgres_server)
    socket = Path(str(make_url(database).query["host"]), ".s.PGSQL.5432")
    settings = {
        "TOPWORK_ADMIN_KEY": KEY,
        "TOPWORK_DATABASE_URL": database,
        "TOPWORK_BACKBONES": text,
        "TOPWORK_RAY_SPREAD": str(SPREAD),
        "TOPWORK_STORE_URL": make_bucket(bucket, f"topwork-{overlay}"),
        "TOPWORK_STORE_OPTIONS": json.dumps(bucket),
    }
    cluster = Cluster(
        resources,
        {"topwork": settings, "topwork-ray": {"RAY_AUTH_TOKEN": secrets.token_hex(16)}},
        network,
        folder,
        image=IMAGE,
        files={folder / "store": STORE, socket: str(socket)},
    )
    try:
        yield Site(cluster)
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def site(
    network: Network,
    bucket: dict[str, str],
    postgres_server: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    """The base with all of its pods."""
    with running("base", network, bucket, postgres_server, tmp_path_factory.mktemp("base")) as site:
        for name, count in (("topwork-serve", 2), ("topwork-worker", 1), ("topwork-haproxy", 2)):
            for _ in range(count):
                site.start(name)
        yield site


class OpenRequest:
    """A request to a pod, which has all of it but its last byte."""

    def __init__(self, pod: Pod, path: str, body: Json) -> None:
        content = json.dumps(body).encode()
        self._last = content[-1:]
        self._connection = http.client.HTTPConnection(pod.address, HTTP, timeout=60)
        self._connection.putrequest("POST", path)
        for name, value in {
            "Authorization": f"Bearer {KEY}",
            "X-Tenant": "acme",
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
        }.items():
            self._connection.putheader(name, value)
        self._connection.endheaders(content[:-1])

    def finish(self) -> int:
        """The status of the answer, now that it has all."""
        self._connection.send(self._last)
        status = self._connection.getresponse().status
        self._connection.close()
        return status


INPUTS = [{"text": TEXTS[0]}]


def learned(caller: Caller) -> None:
    examples = [{"text": text, "label": ("even", "odd")[at % 2]} for at, text in enumerate(TEXTS)]
    assert caller.adapt("words", examples)["live"]


def submit(caller: Caller, adapter: str, count: int) -> Json:
    rows = [f"{number},{tiny_backbones.sentence(number)},{number % 2}" for number in range(count)]
    response = caller.http.post(
        f"/adapt?adapter={adapter}", content="\n".join(["id,text,label", *rows]), headers=CSV
    )
    assert response.status_code == 202, response.text
    job: Json = response.json()
    return job


def stored(caller: Caller, job: Json) -> int:
    progress = caller.call("GET", f"/jobs/{job['id']}")["progress"] or {}
    return int(progress.get("stored", 0))


def hand_over(site: Site, caller: Caller, worker: Pod) -> dict[str, int]:
    """End a worker's pod during its job, which another one does then. What its containers ended with."""
    job = submit(caller, "handed-over", EXAMPLES)
    until(lambda: stored(caller, job) >= 1_000)
    ended = site.cluster.end(worker)
    assert caller.call("GET", f"/jobs/{job['id']}")["state"] == "queued"
    site.start("topwork-worker")
    job = until_finished(caller, job)
    assert (job["state"], job["attempt"]) == ("succeeded", 2), job
    assert caller.call("GET", "/adapters/handed-over")["examples"] == EXAMPLES
    return ended


def replicas(pod: Pod) -> int:
    """How many replicas an HAProxy has that are ready."""
    found = httpx.get(f"http://{pod.address}:{METRICS}/metrics").text
    (count,) = re.findall(r'^haproxy_backend_active_servers\{proxy="replicas"\} (\d+)', found, re.M)
    return int(count)


def test_all_probes_succeed(site: Site) -> None:
    probed = set()
    for name, pods in site.pods.items():
        for pod in pods:
            for container in containers(pod.spec):
                for kind in [kind for kind in container if kind.endswith("Probe")]:
                    assert pod.passes(container, container[kind]), (name, kind)
                    probed.add((name, kind))
    assert len(probed) == 5


def test_requests_through_the_proxies_reach_the_service(site: Site) -> None:
    for proxy in site.pods["topwork-haproxy"]:
        until(lambda proxy=proxy: replicas(proxy) == 2)  # type: ignore[misc]
        with site.caller(proxy) as caller:
            learned(caller)
            assert caller.predict("words", INPUTS)["predictions"]


def test_a_worker_gives_its_job_back_when_its_pod_ends(site: Site) -> None:
    with site.caller(site.pods["topwork-haproxy"][0]) as caller:
        ended = hand_over(site, caller, site.pods["topwork-worker"].pop())
    assert ended["worker"] == 0


@pytest.mark.parametrize("name", ["topwork-serve", "topwork-haproxy"])
def test_a_pod_ends_within_its_time_and_answers_what_it_has(site: Site, name: str) -> None:
    """And no request of others is lost, because HAProxy no longer knows a replica when it ends."""
    pod = site.pods[name].pop()
    other = site.pods["topwork-haproxy"][0]
    with site.caller(other) as caller, ThreadPoolExecutor(1) as pool:
        learned(caller)
        open_request = OpenRequest(pod, "/predict", {"adapter": "words", "inputs": INPUTS})
        ending = pool.submit(site.cluster.end, pod)
        while pod.listens(HTTP):
            assert caller.predict("words", INPUTS)["predictions"]
            known = replicas(other)
        assert known == len(site.pods["topwork-serve"])
        assert caller.predict("words", INPUTS)["predictions"]
        assert not ending.done()
        assert open_request.finish() == 200
        assert set(ending.result().values()) == {0}, pod.log()


def test_nothing_was_written_outside_of_the_volumes(site: Site) -> None:
    """Nor tried to."""
    for pod in site.cluster.pods:
        assert "Read-only file system" not in pod.log()
    for container in (one for pod in site.cluster.pods for one in pod.containers if one.running):
        for folder in ("/", "/etc", "/home/bentoml", STORE, ROOT):
            with pytest.raises(OSError, match="Read-only file system"):
                (container.root / str(folder).lstrip("/") / "file").touch()
        for volume in container.manifest["volumeMounts"]:
            if not volume.get("readOnly"):
                (container.root / volume["mountPath"].lstrip("/") / "file").touch()


@pytest.mark.skipif(not FULL, reason="it takes a minute: make test-scale")
def test_jobs_are_done_on_ray(
    network: Network, bucket: dict[str, str], postgres_server: str, tmp_path: Path
) -> None:
    with running("ray", network, bucket, postgres_server, tmp_path) as site:
        for name, count in (("serve", 1), ("ray-head", 1), ("ray-node", 2), ("worker", 1)):
            for _ in range(count):
                site.start(f"topwork-{name}")
        with site.caller(site.pods["topwork-serve"][0]) as caller:
            (worker,) = site.pods["topwork-worker"]
            job = submit(caller, "uploaded", SPREAD)
            until(lambda: "attempt 1 on node" in worker.log() or not worker.running)
            assert worker.running, worker.log()
            job = until_finished(caller, job)
            assert (job["state"], job["attempt"]) == ("succeeded", 1), job
            # Its log is on the node of the attempt, in Ray's folder.
            logs = [
                log.read_text(errors="replace")
                for node in site.pods["topwork-ray-node"]
                for log in node.folder.glob("tmp/ray/session_2*/logs/worker-*.err")
            ]
            assert any(f"other nodes embedded {SPREAD} inputs" in log for log in logs)
            assert hand_over(site, caller, worker)["worker"] == 0
        for name in ("worker", "ray-node", "ray-head"):
            for pod in site.pods[f"topwork-{name}"]:
                if pod.running:
                    site.cluster.end(pod)
        for pod in site.cluster.pods:
            assert "Read-only file system" not in pod.log()
