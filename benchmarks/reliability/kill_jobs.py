"""Kills the worker and the service with SIGKILL during jobs, and looks at what became of these.

python -m benchmarks.reliability.kill_jobs [--times-worker 50] [--times-server 20]

Several tenants submit fine-tunes and bulk uploads all the while. Once all have ended, each job that was
acknowledged must have one outcome, a version that predicts or a recorded failure, and each version must be
the outcome of one job. Then the database and the store are read without the service: no row may refer to what
is not there whole, and every example of an upload that succeeded must be there.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import httpx

from adapters.examples.target import input_digest
from adapters.jobs.lease import checkpoints
from adapters.registry.errors import KEPT_VERSIONS
from adapters.registry.statements.job_rows import KEPT_JOBS
from benchmarks.data import datasets
from benchmarks.data.datasets import Sample
from benchmarks.harness import client
from benchmarks.harness.report import Report
from benchmarks.harness.service_process import Serving
from benchmarks.reliability.job_outcomes import Outcomes, judge
from benchmarks.reliability.kill import conclude, kill_worker, look_into_the_files, wait_for_the_rest
from benchmarks.reliability.mixed import Asked

# A tenant whose job lost its worker waits for the lease to expire. Eight tenants keep the next worker busy.
TENANTS = tuple(f"tenant-{number}" for number in range(8))
# Submits and cancels at once while the service is killed, so that the kill falls into an acknowledgement.
HASTY = "hasty"
TUNED = ("one", "two")
UPLOADED = "uploaded"
ADAPTERS = (*TUNED, UPLOADED)
LABELS = ("Animals & Nature", "Food & Drink", "Objects")
EXAMPLES_PER_LABEL = 20
# More than a worker stores at once.
UPLOAD_EXAMPLES = 1_010
# Rows that no other upload has, in its first and its last part.
OWN = (0, 500, UPLOAD_EXAMPLES - 1)
QUICK = {"epochs": 2, "full_size_epochs": 1, "pixels": 32, "batch": 16}
LOOK_SECONDS = 0.25
PATIENCE_SECONDS = 600.0
REST_SECONDS = 30.0
# Every fourth kill of a worker hits while files are published or their version is recorded.
AIMED = 4

Json = dict[str, Any]
Attempt = tuple[str, int]


class _Acknowledged(Asked):
    """The requests that the service accepted, and the ends of jobs that it reported."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, dict[str, set[str]]] = defaultdict(dict)
        self.changed: list[str] = []
        self.refused: list[str] = []
        self._ended: dict[str, Json] = {}

    def add(self, tenant: str, job: Json, examples: set[str]) -> None:
        """examples: ids of those uploaded, but the one that is broken."""
        with self.lock:
            self.jobs[tenant][job["id"]] = examples

    def see(self, jobs: Iterable[Json]) -> None:
        """An outcome once told must be told for ever."""
        with self.lock:
            for job in jobs:
                before = self._ended.get(job["id"])
                if before is not None and job != before:
                    self.changed.append(f"{before} became {job}")
                if job["finished_at"] is not None:
                    self._ended[job["id"]] = job


class _Tenants(ExitStack):
    """The tenants of one running service. For one thread; a context manager.

    fresh: attempts that were under way at the last look and that no kill has ended yet.
    """

    def __init__(self, url: str, said: _Acknowledged, over: set[Attempt]) -> None:
        super().__init__()
        server = client.Server(url)
        self.clients = {tenant: client.Client(server, tenant) for tenant in (*TENANTS, HASTY)}
        for one in self.clients.values():
            self.callback(one.close)
        self.fresh: set[Attempt] = set()
        self._said = said
        self._over = over

    def look(self) -> None:
        """Sees what runs, and submits for each tenant that has no job left, its adapters in turn."""
        running: set[Attempt] = set()
        for place, (tenant, caller) in enumerate(self.clients.items()):
            jobs: list[Json] = caller.request("GET", "/jobs").json()["jobs"]
            self._said.see(jobs)
            running |= {(job["id"], job["attempt"]) for job in jobs if job["state"] == "running"}
            if tenant != HASTY and all(job["finished_at"] is not None for job in jobs):
                turn = place + len(self._said.jobs[tenant])
                self.submit(tenant, ADAPTERS[turn % len(ADAPTERS)])
        self.fresh = running - self._over

    def submit(self, tenant: str, adapter: str) -> Json:
        """The job, acknowledged."""
        request, examples = _request(adapter, f"{tenant} {len(self._said.jobs[tenant])}")
        job: Json = self.clients[tenant].request("POST", "/adapt", **request).json()
        self._said.add(tenant, job, examples)
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
        """Go on looking and submitting for this time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_SECONDS))
            if left > LOOK_SECONDS:
                self.look()

    def jobs(self, tenant: str) -> list[Json]:
        """All of a tenant's jobs."""
        answer = self.clients[tenant].request("GET", "/jobs", params={"limit": KEPT_JOBS}).json()
        found: list[Json] = answer["jobs"]
        self._said.see(found)
        return found


def run(worker_kills: int, server_kills: int, *, seed: int = 0, folder: Path) -> Outcomes:
    """Kill the worker and the serving process in turn. The folder must be empty."""
    rng = random.Random(seed)
    home, settings = folder / "home", _settings(folder)
    found, said, over = Outcomes(), _Acknowledged(), set[Attempt]()
    with Serving(home, environment=settings) as running, _Tenants(running.url, said, over) as tenants:
        _teach(tenants)
        seconds = _undisturbed(tenants)
    rounds = max(1, server_kills)
    for number in range(rounds):
        before = running
        with Serving(home, environment=settings) as running, _Tenants(running.url, said, over) as tenants:
            for _ in range(worker_kills * (number + 1) // rounds - worker_kills * number // rounds):
                aimed = found.worker_kills % AIMED == AIMED - 1
                _wait_for_the_moment(tenants, rng, seconds, home if aimed else None)
                over |= tenants.fresh
                kill_worker(running)
                found.worker_kills += 1
            if number < server_kills:
                _wait_for_the_moment(tenants, rng, seconds, None)
                over |= tenants.fresh
                found.during_a_submission += _kill_server(running, said, rng)
                found.server_kills += 1
        print(f"{found.worker_kills} kills of the worker, {found.server_kills} of the service", flush=True)
        # A worker whose service was killed has lived on beside the next one's.
        wait_for_the_rest(before, found, REST_SECONDS)
    wait_for_the_rest(running, found, REST_SECONDS)
    with Serving(home, environment=settings) as running, _Tenants(running.url, said, over) as tenants:
        _wait_for_the_jobs(tenants)
        uploaded = _look_over_http(tenants, said, over, found)
        _wait_for_the_checkpoints(home, found)
    wait_for_the_rest(running, found, REST_SECONDS)
    look_into_the_files(home, (*TENANTS, HASTY), uploaded, found)
    found.changed, found.refused = said.changed, said.refused
    return found


def _settings(folder: Path) -> dict[str, str]:
    """The settings of a service with a small random network, whose fine-tunes take seconds."""
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


def _request(adapter: str, mark: str) -> tuple[Json, set[str]]:
    """How to POST /adapt, and the ids of the examples that it uploads. mark: is in nothing else uploaded."""
    if adapter != UPLOADED:
        body = {"adapter": adapter, "method": "fine_tune", "fine_tune": QUICK, "examples": []}
        return {"json": body}, set()
    samples, lines, ids = _emoji(), [], set[str]()
    for row in range(UPLOAD_EXAMPLES):
        one = samples[row % len(samples)]
        assert isinstance(one.input, bytes)
        # Bytes after a picture's end make another example of the same pixels.
        picture = one.input + (mark if row in OWN else str(row // len(samples))).encode()
        ids.add(input_digest(picture))
        lines.append(json.dumps({"image": base64.b64encode(picture).decode(), "label": one.label}))
    lines.append(json.dumps({"image": "broken", "label": LABELS[0]}))
    headers = {"Content-Type": "application/x-ndjson"}
    return {"content": "\n".join(lines), "params": {"adapter": adapter}, "headers": headers}, ids


@cache
def _emoji() -> list[Sample]:
    return [sample for sample in datasets.load("emoji-google").samples if sample.label in LABELS]


def _teach(tenants: _Tenants) -> None:
    """Gives every adapter that is to be tuned emoji of its own."""
    for number, (tenant, adapter) in enumerate(product(tenants.clients, TUNED)):
        samples, _ = datasets.shots(_emoji(), EXAMPLES_PER_LABEL, number)
        tenants.clients[tenant].adapt(adapter, samples)


def _undisturbed(tenants: _Tenants) -> float:
    """Seconds of the first attempt of a new worker, from its claim to its end."""
    tenants.submit(TENANTS[0], TUNED[0])
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
            request, examples = _request(rng.choice(ADAPTERS), f"{HASTY} {rng.getrandbits(64)}")
            try:
                with said.one():
                    answer = http.post("/adapt", **request)
                    if answer.status_code == 202:
                        said.add(HASTY, answer.json(), examples)
                        answer = http.post(f"/jobs/{answer.json()['id']}/cancel")
            except httpx.TransportError:
                return
            if answer.status_code == 200:
                said.see([answer.json()])
            # Too many are open, or this one ended first.
            elif answer.status_code not in (409, 429):
                said.refused.append(answer.text)


def _wait_for_the_jobs(tenants: _Tenants) -> None:
    """Wait until all have ended, or have had much more time than they need."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        jobs = [job for tenant in tenants.clients for job in tenants.jobs(tenant)]
        if all(job["finished_at"] is not None for job in jobs):
            return
        time.sleep(1.0)


def _look_over_http(
    tenants: _Tenants, said: _Acknowledged, cut: set[Attempt], found: Outcomes
) -> dict[tuple[str, str], set[str]]:
    """The ids of what was uploaded and must be there, by tenant and adapter."""
    uploaded: dict[tuple[str, str], set[str]] = defaultdict(set)
    for tenant, caller in tenants.clients.items():
        jobs, known = tenants.jobs(tenant), said.jobs[tenant]
        last = {job["id"]: job for job in jobs}
        found.acknowledged += len(known)
        found.answers_lost += len(last.keys() - known.keys())
        found.lost.extend(sorted(known.keys() - last.keys()))
        for job in jobs:
            judge(job, found)
            if job["kind"] == "bulk_adapt" and job["state"] == "succeeded" and job["id"] in known:
                sent = known[job["id"]]
                uploaded[tenant, job["adapter"]] |= sent
                # All but the one that is broken.
                if (job["progress"]["stored"], job["progress"]["rejected"]) != (len(sent), 1):
                    found.without_one_outcome.append(str(job))
        mine = ((last[job_id], attempt) for job_id, attempt in cut if job_id in last)
        found.attempts_cut += sum(job["attempt"] > one or job["state"] == "failed" for job, one in mine)
        for adapter in {job["adapter"] for job in jobs}:
            made = [job["version"] for job in jobs if job["adapter"] == adapter and job["version"]]
            _look_at_the_versions(caller, f"{tenant} {adapter}", made, found)
    found.uploaded_examples = sum(len(ids) for ids in uploaded.values())
    return uploaded


def _look_at_the_versions(caller: client.Client, name: str, made: Sequence[int], found: Outcomes) -> None:
    """name: of the tenant and the adapter. made: what its jobs name; those that are kept must predict."""
    adapter = name.split()[1]
    method = "linear_probe" if adapter == UPLOADED else "fine_tune"
    listed = caller.request("GET", f"/adapters/{adapter}/versions").json()["versions"]
    jobs_own = {version["version"] for version in listed if version["method"] == method}
    twice = sorted(number for number, count in Counter(made).items() if count > 1)
    found.numbers_twice.extend(f"{name} version {number}" for number in twice)
    found.nobodys_versions.extend(f"{name} version {number}" for number in sorted(jobs_own - set(made)))
    newest = max((version["version"] for version in listed), default=0)
    for number in (number for number in made if number > newest - KEPT_VERSIONS):
        query = {"adapter": adapter, "version": number, "inputs": [client.as_input(_emoji()[0])]}
        try:
            version = caller.request("GET", f"/adapters/{adapter}/versions/{number}").json()
            answer = caller.request("POST", "/predict", json=query).json()
        except httpx.HTTPStatusError as error:
            found.unusable.append(f"{name} version {number}: {error}")
            continue
        predicted = answer["predictions"][0].get("label") in LABELS
        if version["method"] != method or answer["version"] != number or not predicted:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/kill_jobs.md and .json; 1 if a promise was not kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability.kill_jobs", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--times-worker", type=int, default=50)
    parser.add_argument("--times-server", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = Report("kill_jobs", "Kills during jobs")
    with tempfile.TemporaryDirectory(prefix="topwork-bench-") as folder:
        found = run(options.times_worker, options.times_server, seed=options.seed, folder=Path(folder))
    return conclude(report, found)


if __name__ == "__main__":
    raise SystemExit(main())
