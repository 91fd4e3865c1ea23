"""What a bucket that hangs costs the requests that do not need it.

python -m benchmarks.reliability.hung_bucket

Rounds in which the bucket answers and rounds in which it hangs take turns. In the latter twenty callers ask
for predictions whose heads lie in the bucket, and again each second after they are refused.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import numpy as np

from benchmarks.harness.bucket_process import BucketProcess
from benchmarks.harness.report import Report, table
from benchmarks.harness.service_process import Serving

COLD = 20
ROUNDS = 3
SECONDS = 20.0  # of each round
PAUSE_SECONDS = 1.0  # as Retry-After asks for
BACK_SECONDS = 60.0
SETTINGS = {"TOPWORK_BACKBONES": "minilm-l6-v2", "TOPWORK_WORKERS": "0"}
HEADERS = {"X-Tenant": "default"}
KNOWN = "known"
READS, PREDICTIONS = "reads of the database", "predictions with heads in memory"


class Waiter:
    """Asks for a prediction with a head in the bucket, again after each refusal, until it is ended."""

    def __init__(self, url: str, adapter: str) -> None:
        self.seconds: list[tuple[float, float]] = []  # when each request began, and what it took
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(url, adapter))
        self._thread.start()

    def _ask(self, url: str, adapter: str) -> None:
        with _client(url) as client:
            while not self._ended.is_set():
                begun = time.perf_counter()
                refused = _predict(client, adapter).status_code == 503
                self.seconds.append((begun, time.perf_counter() - begun))
                assert refused, f"{adapter} was answered"
                self._ended.wait(PAUSE_SECONDS)

    def end(self) -> None:
        """Ask no more."""
        self._ended.set()
        self._thread.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/hung_bucket.md and .json; 1 if a target is missed."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    report = Report("hung_bucket", "Requests beside a bucket that hangs")
    normal: dict[str, list[float]] = {READS: [], PREDICTIONS: []}
    hung: dict[str, list[float]] = {READS: [], PREDICTIONS: []}
    first: list[float] = []
    later: list[float] = []
    back: list[float] = []
    with tempfile.TemporaryDirectory(prefix="topwork-bench-") as home, BucketProcess() as bucket:
        settings = {**SETTINGS, **bucket.environment}
        with Serving(Path(home), environment=settings) as serving, _client(serving.url) as client:
            for number in range(COLD + ROUNDS):
                _adapt(client, f"cold{number}", number)
            _adapt(client, KNOWN, COLD + ROUNDS)
        # Started again, it has no head in memory.
        with Serving(Path(home), environment=settings) as serving, _client(serving.url) as client:
            _ask(client, 2.0)
            for number in range(ROUNDS):
                _add(normal, _ask(client, SECONDS))
                bucket.hang()
                waiters = [Waiter(serving.url, f"cold{number}") for number in range(COLD)]
                _add(hung, _ask(client, SECONDS))
                for waiter in waiters:
                    waiter.end()
                opened = min(begun + took for one in waiters for begun, took in one.seconds)
                for began, took in (pair for one in waiters for pair in one.seconds):
                    (later if began > opened else first).append(took)
                bucket.resume()
                back.append(_seconds_to_return(client, f"cold{COLD + number}"))
    _tell(report, normal, hung, {"first": first, "later": later, "back": back})
    return report.finish()


def _client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers=HEADERS, timeout=180.0)


def _adapt(client: httpx.Client, adapter: str, seed: int) -> None:
    """Four examples a label, whose head no other seed has."""
    examples = [
        {"text": f"{word} number {8 * seed + number}", "label": word}
        for word in ("invoice", "holiday")
        for number in range(4)
    ]
    client.post("/adapt", json={"adapter": adapter, "examples": examples}).raise_for_status()


def _predict(client: httpx.Client, adapter: str) -> httpx.Response:
    return client.post("/predict", json={"adapter": adapter, "inputs": [{"text": "the invoice of May"}]})


def _ask(client: httpx.Client, seconds: float) -> dict[str, list[float]]:
    """Latencies in seconds of requests that need no bucket, one at a time, by what they need."""
    found: dict[str, list[float]] = {READS: [], PREDICTIONS: []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        client.get(f"/adapters/{KNOWN}").raise_for_status()
        between = time.perf_counter()
        _predict(client, KNOWN).raise_for_status()
        found[READS].append(between - begun)
        found[PREDICTIONS].append(time.perf_counter() - between)
    return found


def _add(to: dict[str, list[float]], found: Mapping[str, list[float]]) -> None:
    for name, values in found.items():
        to[name] += values


def _seconds_to_return(client: httpx.Client, adapter: str) -> float:
    """Seconds until a prediction whose head lies in the bucket is answered again."""
    begun = time.perf_counter()
    while _predict(client, adapter).status_code != 200:
        if time.perf_counter() - begun > BACK_SECONDS:
            return float("inf")
        time.sleep(0.05)
    return time.perf_counter() - begun


def _tell(
    report: Report,
    normal: Mapping[str, list[float]],
    hung: Mapping[str, list[float]],
    waits: Mapping[str, list[float]],
) -> None:
    rows = []
    for name in (READS, PREDICTIONS):
        before, beside = (1e3 * np.array(values[name]) for values in (normal, hung))
        rows += [
            [name, kind, str(len(times)), f"{np.median(times):.1f}", f"{np.quantile(times, 0.99):.1f}",
             f"{times.max():.0f}"]
            for kind, times in (("answers", before), ("hangs", beside))
        ]  # fmt: skip
        ratio = float(np.quantile(beside, 0.99) / np.quantile(before, 0.99))
        report.expect(f"{name}: p99 beside a bucket that hangs, times normal", ratio, "<=", 2.0)
    report.add(
        "Requests that need no bucket", table(["", "bucket", "requests", "p50, ms", "p99", "max"], rows)
    )
    report.expect("refusals before the first answer", max(waits["first"]), "<=", 10.0, " s")
    report.expect("refusals after it", max(waits["later"]), "<=", 5.0, " s")
    report.expect("answers after the bucket goes on", max(waits["back"]), "<=", 10.0, " s")
    report.data["refused after seconds"] = {name: waits[name] for name in ("first", "later")}
    report.data["back after seconds"] = waits["back"]


if __name__ == "__main__":
    raise SystemExit(main())
