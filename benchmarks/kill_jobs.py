"""Kills the worker and the service with SIGKILL during fine-tunes, and looks at what became of the jobs.

python -m benchmarks.kill_jobs [--times-worker 50] [--times-server 20]

Several tenants submit fine-tunes all the while. Once all have ended, each job that was acknowledged must have
one outcome, a version that predicts or a recorded failure, and each fine-tuned version must be the outcome of
one job. Then the database and the store are read without the service: no row may refer to an artifact that is
not there whole.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from adapters.lease import checkpoints
from adapters.records import KEPT_VERSIONS
from adapters.registry import Registry
from adapters.store import StoreError, open_store
from benchmarks import client, datasets
from benchmarks.datasets import Sample
from benchmarks.report import Report, table
from benchmarks.serving import Serving

# A tenant whose job has lost its worker waits for the lease to run out: so many have work for the next one.
TENANTS = tuple(f"tenant-{number}" for number in range(8))
# Submits and cancels at once while the service is killed, so that the kill falls into an acknowledgement.
HASTY = "hasty"
ADAPTERS = ("one", "two")
LABELS = ("Animals & Nature", "Food & Drink", "Objects")
EXAMPLES_PER_LABEL = 20
QUICK = {"epochs": 2, "full_size_epochs": 1, "pixels": 32, "batch": 16}
LOOK_SECONDS = 0.25
PATIENCE_SECONDS = 600.0
REST_SECONDS = 30.0
# One kill of a worker in so many comes while files are published or their version is recorded.
AIMED = 4

Json = dict[str, Any]
Attempt = tuple[str, int]


@dataclass(slots=True)
class Outcomes:
    """What a run found. The lists are empty if every promise was kept."""

    worker_kills: int = 0
    server_kills: int = 0
    attempts_cut: int = 0
    during_a_submission: int = 0
    acknowledged: int = 0
    answers_lost: int = 0
    states: dict[str, int] = field(default_factory=dict)
    succeeded_later: int = 0
    attempts: int = 0
    orphaned_artifacts: int = 0
    partial_checkpoints: int = 0
    lost: list[str] = field(default_factory=list)
    without_one_outcome: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    failed_otherwise: list[str] = field(default_factory=list)
    numbers_twice: list[str] = field(default_factory=list)
    nobodys_versions: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    broken_rows: list[str] = field(default_factory=list)
    left_running: list[str] = field(default_factory=list)
    checkpoints_left: list[str] = field(default_factory=list)

    @property
    def failures(self) -> dict[str, list[str]]:
        """Every promise with the cases in which it was not kept."""
        return {
            "jobs acknowledged and lost": self.lost,
            "jobs without exactly one outcome": self.without_one_outcome,
            "outcomes that changed": self.changed,
            "failed but for exhausted attempts": self.failed_otherwise,
            "versions that two jobs name": self.numbers_twice,
            "fine-tuned versions that no job names": self.nobodys_versions,
            "versions that are not there or do not predict": self.unusable,
            "submissions or cancels refused": self.refused,
            "rows without their artifact": self.broken_rows,
            "processes left running": self.left_running,
            "checkpoints of ended jobs left": self.checkpoints_left,
        }

    @property
    def sound(self) -> bool:
        """Whether every promise was kept."""
        return not any(self.failures.values())


class _Acknowledged:
    """What the service has said yes to, and how it said that jobs ended. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.jobs: dict[str, set[str]] = defaultdict(set)
        self.changed: list[str] = []
        self.refused: list[str] = []
        self.answering = 0
        self._ended: dict[str, Json] = {}

    def add(self, tenant: str, job: Json) -> None:
        with self._lock:
            self.jobs[tenant].add(job["id"])

    def see(self, jobs: Iterable[Json]) -> None:
        """An outcome once told must be told for ever."""
        with self._lock:
            for job in jobs:
                before = self._ended.get(job["id"])
                if before is not None and job != before:
                    self.changed.append(f"{before} became {job}")
                if job["finished_at"] is not None:
                    self._ended[job["id"]] = job

    def begin(self, change: int) -> None:
        with self._lock:
            self.answering += change


class _Tenants:
    """The tenants of one running service. For one thread; a context manager.

    fresh: attempts that were under way at the last look and that no kill has ended yet.
    """

    def __init__(self, url: str, said: _Acknowledged, over: set[Attempt]) -> None:
        server = client.Server(url)
        self.clients = {tenant: client.Client(server, tenant) for tenant in (*TENANTS, HASTY)}
        self.fresh: set[Attempt] = set()
        self._said = said
        self._over = over

    def __enter__(self) -> _Tenants:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.clients.values():
            one.close()

    def look(self) -> None:
        """Sees what runs, and submits for each tenant that has no job left, its adapters in turn."""
        running: set[Attempt] = set()
        for tenant, caller in self.clients.items():
            jobs: list[Json] = caller.request("GET", "/jobs").json()["jobs"]
            self._said.see(jobs)
            running |= {(job["id"], job["attempt"]) for job in jobs if job["state"] == "running"}
            if tenant != HASTY and all(job["finished_at"] is not None for job in jobs):
                self.submit(tenant, ADAPTERS[len(jobs) % len(ADAPTERS)])
        self.fresh = running - self._over

    def submit(self, tenant: str, adapter: str) -> Json:
        """The job, acknowledged."""
        job: Json = self.clients[tenant].request("POST", "/adapt", json=_request(adapter)).json()
        self._said.add(tenant, job)
        return job

    def wait_for_an_attempt(self) -> None:
        """Returns with one in `fresh`. Raises TimeoutError."""
        end = time.monotonic() + PATIENCE_SECONDS
        self.look()
        while not self.fresh:
            if time.monotonic() > end:
                raise TimeoutError("No job was begun; the service's log says why.")
            time.sleep(LOOK_SECONDS)
            self.look()

    def watch(self, seconds: float) -> None:
        """Goes on looking and submitting for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_SECONDS))
            if left > LOOK_SECONDS:
                self.look()

    def jobs(self, tenant: str) -> list[Json]:
        """All of a tenant's jobs."""
        found: list[Json] = []
        cursor: str | None = None
        while True:
            query = {"limit": 1_000} | ({"cursor": cursor} if cursor else {})
            page = self.clients[tenant].request("GET", "/jobs", params=query).json()
            found += page["jobs"]
            cursor = page["next"]
            if cursor is None:
                self._said.see(found)
                return found


def run(worker_kills: int, server_kills: int, *, seed: int = 0, folder: Path) -> Outcomes:
    """Kills the worker and the serving process so many times, in turn. The folder must be empty."""
    rng = random.Random(seed)
    home, settings = folder / "home", _settings(folder)
    found, said, over = Outcomes(), _Acknowledged(), set[Attempt]()
    with Serving(home, environment=settings) as running, _Tenants(running.url, said, over) as tenants:
        samples = _teach(tenants)
        seconds = _undisturbed(tenants)
    rounds = max(1, server_kills)
    for number in range(rounds):
        before = running
        with Serving(home, environment=settings) as running, _Tenants(running.url, said, over) as tenants:
            for _ in range(worker_kills * (number + 1) // rounds - worker_kills * number // rounds):
                aimed = found.worker_kills % AIMED == AIMED - 1
                _wait_for_the_moment(tenants, rng, seconds, home if aimed else None)
                over |= tenants.fresh
                _kill_worker(running)
                found.worker_kills += 1
            if number < server_kills:
                _wait_for_the_moment(tenants, rng, seconds, None)
                over |= tenants.fresh
                found.during_a_submission += _kill_server(running, said, rng)
                found.server_kills += 1
        print(f"{found.worker_kills} kills of the worker, {found.server_kills} of the service", flush=True)
        # A worker whose service was killed has lived on beside the next one's.
        _wait_for_the_rest(before, found)
    _wait_for_the_rest(running, found)
    with Serving(home, environment=settings) as running, _Tenants(running.url, said, over) as tenants:
        _wait_for_the_jobs(tenants)
        _look_over_http(tenants, said, samples[0], over, found)
        _wait_for_the_checkpoints(home, found)
    _wait_for_the_rest(running, found)
    _look_into_the_files(home, found)
    found.changed, found.refused = said.changed, said.refused
    return found


def _settings(folder: Path) -> dict[str, str]:
    """Of a service with a small random network, whose fine-tunes take seconds."""
    import timm
    import torch

    torch.manual_seed(1)
    network = folder / "network"
    timm.models.save_for_hf(
        timm.create_model("test_efficientnet", num_classes=5), str(network), safe_serialization=True
    )
    return {
        "TOPWORK_BACKBONES": f"timm:{network}",
        "TOPWORK_ACCESS_LOG": "false",
        # Its export must not stay in the model store.
        "BENTOML_HOME": str(folder / "bentoml"),
    }


def _request(adapter: str) -> Json:
    return {"adapter": adapter, "method": "fine_tune", "fine_tune": QUICK, "examples": []}


def _teach(tenants: _Tenants) -> list[Sample]:
    """Gives every adapter emoji of its own; those of the last one."""
    emoji = [sample for sample in datasets.load("emoji-google").samples if sample.label in LABELS]
    samples: list[Sample] = []
    for number, (tenant, adapter) in enumerate(_adapters()):
        samples, _ = datasets.shots(emoji, EXAMPLES_PER_LABEL, number)
        tenants.clients[tenant].adapt(adapter, samples)
    return samples


def _adapters() -> Iterator[tuple[str, str]]:
    return ((tenant, adapter) for tenant in (*TENANTS, HASTY) for adapter in ADAPTERS)


def _undisturbed(tenants: _Tenants) -> float:
    """Seconds of the first attempt of a new worker, from its claim to its end."""
    tenants.submit(TENANTS[0], ADAPTERS[0])
    begun: float | None = None
    while (job := tenants.jobs(TENANTS[0])[0])["finished_at"] is None:
        if begun is None and job["state"] == "running":
            begun = time.monotonic()
        time.sleep(LOOK_SECONDS)
    if begun is None or job["state"] != "succeeded":
        raise RuntimeError(f"A fine-tune that nobody disturbed did not succeed: {job}")
    return time.monotonic() - begun


def _wait_for_the_moment(tenants: _Tenants, rng: random.Random, seconds: float, home: Path | None) -> None:
    """Any moment of an attempt; with a home folder, one while the attempt publishes or records."""
    tenants.wait_for_an_attempt()
    if home is None:
        tenants.watch(rng.uniform(0.0, seconds))
        return
    end = time.monotonic() + PATIENCE_SECONDS
    before = _artifacts(home)
    while _artifacts(home) <= before:
        if time.monotonic() > end:
            raise TimeoutError("No job published anything; the service's log says why.")
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.1))


def _artifacts(home: Path) -> set[Path]:
    return set((home / "artifacts").glob("*/*/*"))


def _kill_worker(running: Serving) -> None:
    """kill -9 of the process that does the service's jobs. Raises ProcessLookupError."""
    for pid in running.group():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"adapters.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                return
    raise ProcessLookupError("The service has no worker.")


def _kill_server(running: Serving, said: _Acknowledged, rng: random.Random) -> bool:
    """kill -9 of the serving process; whether it was about to answer a submission or a cancel."""
    stop = threading.Event()
    arguments = (running.url, rng.getrandbits(32), said, stop)
    caller = threading.Thread(target=_submit_and_cancel, args=arguments)
    caller.start()
    time.sleep(rng.uniform(0.05, 0.5))
    during = said.answering > 0
    running.kill()
    stop.set()
    caller.join()
    return during


def _submit_and_cancel(url: str, seed: int, said: _Acknowledged, stop: threading.Event) -> None:
    """Goes on until the service is gone; notes only what it acknowledged."""
    rng = random.Random(seed)
    with httpx.Client(base_url=url, headers={"X-Tenant": HASTY}, timeout=60) as http:
        while not stop.is_set():
            said.begin(+1)
            try:
                answer = http.post("/adapt", json=_request(rng.choice(ADAPTERS)))
                if answer.status_code == 202:
                    said.add(HASTY, answer.json())
                    answer = http.post(f"/jobs/{answer.json()['id']}/cancel")
            except httpx.TransportError:
                return
            finally:
                said.begin(-1)
            if answer.status_code == 200:
                said.see([answer.json()])
            # Too many are open, or this one ended first.
            elif answer.status_code not in (409, 429):
                said.refused.append(answer.text)


def _wait_for_the_jobs(tenants: _Tenants) -> None:
    """Until all have ended, or have had much more time than they need."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        jobs = [job for tenant in tenants.clients for job in tenants.jobs(tenant)]
        if all(job["finished_at"] is not None for job in jobs):
            return
        time.sleep(1.0)


def _look_over_http(
    tenants: _Tenants, said: _Acknowledged, sample: Sample, cut: set[Attempt], found: Outcomes
) -> None:
    for tenant in tenants.clients:
        jobs = tenants.jobs(tenant)
        ids = {job["id"] for job in jobs}
        found.acknowledged += len(said.jobs[tenant])
        found.answers_lost += len(ids - said.jobs[tenant])
        found.lost.extend(sorted(said.jobs[tenant] - ids))
        for job in jobs:
            _judge(job, found)
        last = {job["id"]: job for job in jobs}
        found.attempts_cut += sum(
            _went_on(last[job_id], attempt) for job_id, attempt in cut if job_id in last
        )
        for adapter in ADAPTERS:
            mine = (job for job in jobs if job["adapter"] == adapter)
            made = [job["version"] for job in mine if job["version"] is not None]
            _look_at_the_versions(tenants, (tenant, adapter), made, sample, found)


def _judge(job: Json, found: Outcomes) -> None:
    state, version, error = job["state"], job["version"], job["error"]
    code = (error or {}).get("code")
    whole = {
        "succeeded": version is not None and error is None,
        "failed": version is None and bool(code),
        "cancelled": version is None and error is None,
    }
    if not whole.get(state, False):
        found.without_one_outcome.append(str(job))
    if state == "failed" and code != "attempts_exhausted":
        found.failed_otherwise.append(str(job))
    ended = f"{state}: {code}" if code else state
    found.states[ended] = found.states.get(ended, 0) + 1
    found.attempts += job["attempt"]
    found.succeeded_later += state == "succeeded" and job["attempt"] > 1


def _went_on(job: Json, attempt: int) -> bool:
    """Whether the attempt came to no end of its own."""
    exhausted = (job["error"] or {}).get("code") == "attempts_exhausted"
    return bool(job["attempt"] > attempt or exhausted)


def _look_at_the_versions(
    tenants: _Tenants, which: tuple[str, str], made: Sequence[int], sample: Sample, found: Outcomes
) -> None:
    """made: the versions that the adapter's jobs name. Those that are kept must predict."""
    (tenant, adapter), name = which, " ".join(which)
    caller = tenants.clients[tenant]
    listed = caller.request("GET", f"/adapters/{adapter}/versions").json()["versions"]
    tuned = {version["version"] for version in listed if version["method"] == "fine_tune"}
    twice = sorted(number for number, count in Counter(made).items() if count > 1)
    found.numbers_twice.extend(f"{name} version {number}" for number in twice)
    found.nobodys_versions.extend(f"{name} version {number}" for number in sorted(tuned - set(made)))
    newest = max(version["version"] for version in listed)
    for number in (number for number in made if number > newest - KEPT_VERSIONS):
        query = {"adapter": adapter, "version": number, "inputs": [client.as_input(sample)]}
        try:
            version = caller.request("GET", f"/adapters/{adapter}/versions/{number}").json()
            answer = caller.request("POST", "/predict", json=query).json()
        except httpx.HTTPStatusError as error:
            found.unusable.append(f"{name} version {number}: {error}")
            continue
        predicted = answer["predictions"][0].get("label") in LABELS
        if version["method"] != "fine_tune" or answer["version"] != number or not predicted:
            found.unusable.append(f"{name} version {number}: {version['method']}, {answer}")


def _wait_for_the_checkpoints(home: Path, found: Outcomes) -> None:
    """The worker removes them as soon as it has nothing else to do."""
    end = time.monotonic() + REST_SECONDS
    while left := checkpoints(home / "jobs"):
        if time.monotonic() > end:
            found.checkpoints_left = sorted(path.name for path in left)
            break
        time.sleep(LOOK_SECONDS)
    found.partial_checkpoints = len(list((home / "jobs").glob("*.partial")))


def _look_into_the_files(home: Path, found: Outcomes) -> None:
    registry, store = Registry(f"sqlite:///{home / 'topwork.db'}"), open_store(str(home / "artifacts"))
    try:
        referenced = set()
        for tenant in (*TENANTS, HASTY):
            for record in registry.adapters(tenant):
                for artifact in registry.referenced(record.uid):
                    referenced.add(artifact.name)
                    try:
                        store.read(tenant, record.uid, artifact)
                    except StoreError as error:
                        found.broken_rows.append(f"{tenant} {record.name}: {error}")
        found.orphaned_artifacts = sum(1 for stored in store.objects() if stored.name not in referenced)
    finally:
        registry.close()


def _wait_for_the_rest(running: Serving, found: Outcomes) -> None:
    """What the killed process had started must end by itself."""
    end = time.monotonic() + REST_SECONDS
    while running.group():
        if time.monotonic() > end:
            found.left_running.append(str(running.group()))
            return
        time.sleep(0.02)


def _counts(found: Outcomes) -> Mapping[str, int]:
    return {
        "kills of the worker": found.worker_kills,
        "kills of the serving process": found.server_kills,
        "kills that cut an attempt short": found.attempts_cut,
        "kills while a submission or a cancel was being answered": found.during_a_submission,
        "jobs acknowledged": found.acknowledged,
        "jobs recorded whose acknowledgement was lost": found.answers_lost,
        "attempts begun": found.attempts,
        "jobs that succeeded in a later attempt": found.succeeded_later,
        **{f"jobs {state}": count for state, count in sorted(found.states.items())},
        "artifacts left for the sweep": found.orphaned_artifacts,
        "checkpoints left half written": found.partial_checkpoints,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/kill_jobs.md and .json; 1 if a promise was not kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill_jobs", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--times-worker", type=int, default=50)
    parser.add_argument("--times-server", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = Report("kill_jobs", "Kills during fine-tunes")
    with tempfile.TemporaryDirectory(prefix="topwork-bench-") as folder:
        found = run(options.times_worker, options.times_server, seed=options.seed, folder=Path(folder))
    counts = _counts(found)
    report.add("What happened", table(["", ""], [[name, str(count)] for name, count in counts.items()]))
    for name, cases in found.failures.items():
        report.expect(name, len(cases), "<=", 0)
    report.data |= asdict(found)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
