"""Two replicas behind the shipped HAProxy file, on one database and one bucket.

TOPWORK_TEST_SCALE=full repeats the changes and the ends of replicas as often as is promised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.harness.service_process import Serving
from benchmarks.reliability import replicas
from deploy.cluster.bucket import store_options
from deploy.cluster.processes import NotInstalled
from deploy.cluster.proxy import FILE, HAProxy
from tests.support.models import tiny_backbones
from tests.support.service.calls import get
from tests.support.storage import new_bucket, new_schema, unavailable

FULL = os.environ.get("TOPWORK_TEST_SCALE") == "full"
# Within 1 s on a machine that has time; the tests share theirs.
SEEN_SECONDS = 1.0 if FULL else 5.0
CHANGES = 20 if FULL else 2
ENDS = 5 if FULL else 1
REQUESTS = replicas.REQUESTS if FULL else 300
TENANTS = replicas.TENANTS
TEXTS = [tiny_backbones.sentence(seed) for seed in range(8)]

Start = Callable[[str], Serving]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, postgres_server: str, s3_server: str) -> Iterator[Start]:
    """Starts replicas of one service with the tiny text backbone; they end with the module."""
    home = tmp_path_factory.mktemp("replicas")
    _, text = tiny_backbones.install(home / "bentoml", measured=True)
    options = store_options(s3_server)
    environment = {
        **replicas.settings(new_schema(postgres_server), new_bucket(options), options),
        "BENTOML_HOME": str(home / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "true",
        "TOPWORK_BACKBONES": text,
    }
    started: list[Serving] = []

    def start(name: str) -> Serving:
        started.append(Serving(home / name, environment=environment))
        return started[-1]

    yield start
    for replica in started:
        if replica.process.poll() is None:
            replica.stop()


@pytest.fixture(scope="module")
def pair(start: Start) -> tuple[Serving, Serving]:
    """Two replicas that stay."""
    return start("one"), start("other")


@pytest.fixture(scope="module")
def spare(start: Start) -> list[Serving]:
    """A third replica, which is replaced when a test has ended it."""
    return [start("spare")]


def proxied(urls: tuple[str, ...], home: Path, file: Path = FILE) -> HAProxy:
    try:
        return HAProxy(urls, home, file=file)
    except NotInstalled as error:
        unavailable("haproxy", f"{error} is not installed")


def test_changes_on_one_replica_are_seen_on_the_other(pair: tuple[Serving, Serving]) -> None:
    found = replicas.delays(pair[0].url, pair[1].url, CHANGES, TEXTS)
    assert found.keys() == {"new version", "rollback", "deletion", "revocation"}
    assert all(max(seconds) <= SEEN_SECONDS for seconds in found.values()), found


def test_a_tenant_keeps_its_replica(
    pair: tuple[Serving, Serving], spare: list[Serving], tmp_path: Path
) -> None:
    """So each head is loaded once, and not by each replica."""
    urls = (pair[0].url, pair[1].url)
    loaded = {}
    for name, file in (("hashed", FILE), ("robin", replicas.round_robin(tmp_path))):
        known = replicas.adapters(spare[-1].url, name, TENANTS, TEXTS)
        with proxied(urls, tmp_path, file) as proxy:
            loaded[name] = replicas.misses(proxy, urls, [tenant for tenant, _ in known], TEXTS[0])
    assert loaded["hashed"] <= 0.6 * loaded["robin"], loaded


@pytest.mark.parametrize("sign", ["SIGTERM", "SIGKILL"])
def test_the_end_of_a_replica_under_load(
    start: Start, pair: tuple[Serving, Serving], spare: list[Serving], tmp_path: Path, sign: str
) -> None:
    """A replica that is told to end loses nothing; one that is killed, at most what it was working on."""
    known = replicas.adapters(pair[0].url, f"{sign.lower()}-", 4, TEXTS)
    for number in range(ENDS):
        if spare[-1].process.poll() is not None:
            spare.append(start(f"{sign}-{number}"))
        ending = spare[-1]
        with proxied((pair[0].url, ending.url), tmp_path) as proxy:
            callers = replicas.Callers(proxy.url, known, TEXTS[0], REQUESTS)
            found = callers.run(ending.stop if sign == "SIGTERM" else ending.kill)
        assert found.answered + found.lost >= REQUESTS
        assert found.lost <= (0 if sign == "SIGTERM" else found.open), found


def test_the_proxy_answers_in_the_format_of_the_service(
    pair: tuple[Serving, Serving], tmp_path: Path
) -> None:
    with proxied((pair[0].url,), tmp_path) as proxy:
        assert get(f"{proxy.url}/livez")[0] == 200
        assert b"haproxy_backend_active_servers" in get(proxy.metrics)[1]
        status, body, _ = get(f"{proxy.url}/metrics")
        assert (status, b'"not_found"' in body) == (404, True)
        answer = get(f"{proxy.url}/adapters", **{"X-Request-ID": "mine"})
        assert (answer[0], answer[2]["x-request-id"]) == (401, "mine")
