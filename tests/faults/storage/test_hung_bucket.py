"""A bucket that hangs stops what needs it and nothing else, and what needs it works again by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest

from benchmarks.harness.bucket_process import BucketProcess
from benchmarks.harness.service_process import Serving
from tests.support.adapters.adapter_stack import says
from tests.support.conditions import until
from tests.support.service.client import Caller, Json
from tests.support.service.faulty_service import environment
from tests.support.storage import unavailable

COLD = [f"cold{number}" for number in range(20)]
INPUTS = [{"text": "ba bo bu"}]
# A read of the database took 78 seconds here, on two cores that had other work.
SOON = 2.0


def examples(seed: int) -> list[Json]:
    """Examples of two labels, whose head no other seed has."""
    return [
        {"id": f"{label}{number}", "text": says(label, 10 * seed + number), "label": label}
        for number in range(4)
        for label in ("one", "two")
    ]


@dataclass
class Cluster:
    """Two replicas over one database and one bucket, and a tenant's caller of each."""

    bucket: BucketProcess
    one: Caller
    other: Caller
    log: Path  # of the second replica


@pytest.fixture
def cluster(tmp_path: Path, postgres_url: str) -> Iterator[Cluster]:
    """Two replicas. Only the first has heads in memory: the tenant's adapters `known` and all COLD."""
    try:
        bucket = BucketProcess()
    except ImportError as error:
        unavailable("s3", str(error))
    with bucket:
        settings = {
            **environment(tmp_path),
            **bucket.environment,
            "TOPWORK_DATABASE_URL": postgres_url,
            "TOPWORK_WORKERS": "0",
        }
        with (
            Serving(tmp_path / "one", environment=settings) as first,
            Serving(tmp_path / "other", environment=settings) as second,
        ):
            one, other = Caller(first.url, "acme"), Caller(second.url, "acme")
            with one.http, other.http:
                for seed, name in enumerate(("known", *COLD)):
                    one.adapt(name, examples(seed))
                yield Cluster(bucket, one, other, second.log)
                bucket.resume()


def timed(call: Callable[[], httpx.Response]) -> tuple[float, httpx.Response]:
    """Seconds that a request took, and its answer."""
    begun = time.monotonic()
    answer = call()
    return time.monotonic() - begun, answer


def predict(caller: Caller, adapter: str) -> httpx.Response:
    """The answer of POST /predict."""
    return caller.http.post("/predict", json={"adapter": adapter, "inputs": INPUTS})


def refused(answer: httpx.Response) -> bool:
    """Whether the store was not available, with advice when to ask again."""
    return (
        answer.status_code == 503
        and answer.json()["code"] == "store_unavailable"
        and int(answer.headers["retry-after"]) >= 1
    )


def metric(caller: Caller, name: str) -> float:
    """The value of a metric without labels."""
    lines = caller.http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def test_a_hung_bucket_leaves_the_rest_of_a_replica_alone(cluster: Cluster) -> None:
    bucket, one, other = cluster.bucket, cluster.one, cluster.other
    one.adapt("known", examples(100), promote="always")
    assert predict(other, "known").json()["version"] == 2
    assert metric(other, "topwork_store_available") == 1.0

    bucket.hang()
    with ThreadPoolExecutor(len(COLD)) as threads:
        waiting = [threads.submit(timed, partial(predict, other, name)) for name in COLD]
        slowest = 0.0
        while not all(cold.done() for cold in waiting):
            for call in (partial(other.http.get, "/adapters/known"), partial(predict, other, "known")):
                seconds, answer = timed(call)
                assert answer.status_code == 200
                slowest = max(slowest, seconds)
        cold_answers = [cold.result() for cold in waiting]
    assert [answer.text for _, answer in cold_answers if not refused(answer)] == []
    assert max(seconds for seconds, _ in cold_answers) < 15.0
    assert slowest < SOON
    assert metric(other, "topwork_store_available") == 0.0
    for name in COLD:
        seconds, answer = timed(partial(predict, other, name))
        assert refused(answer)
        assert seconds < SOON

    # A rollback needs no bucket. The other replica follows, although it cannot read the head.
    seconds, answer = timed(partial(one.http.put, "/adapters/known/aliases/live", json={"version": 1}))
    assert answer.status_code == 200
    assert seconds < SOON
    until(lambda: refused(predict(other, "known")), seconds=10)
    assert timed(partial(predict, other, "known"))[0] < SOON

    bucket.resume()
    until(lambda: metric(other, "topwork_store_available") == 1.0, seconds=15)
    assert predict(other, "known").json()["version"] == 1
    assert all(predict(other, name).status_code == 200 for name in COLD)
    assert other.adapt("after", examples(101))
    said = cluster.log.read_text()
    assert said.count("the bucket does not answer; calls are refused until it does") == 1
    assert said.count("the bucket answers again") == 1
