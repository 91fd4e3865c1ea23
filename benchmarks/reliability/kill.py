"""Kills the service with SIGKILL under mixed load, again and again, and looks for what was lost.

python -m benchmarks.reliability.kill [--times 200]

After each kill the database and the store are read without the service: no row may refer to an artifact that
is not there whole, and what was acknowledged must be there, or gone. After each restart every acknowledged
version must be there and predict, and as it did before.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from adapters.registry.registry import Registry
from adapters.storage.artifact import StoreError
from adapters.storage.open import open_store
from benchmarks.harness.report import Report, table
from benchmarks.harness.service_process import Serving
from benchmarks.reliability.mixed import ASKED, TENANT, Caller, Said, query

CALLERS = 4
LONGEST_SECONDS = 1.5
REST_SECONDS = 10.0
JOBS_SECONDS = 600.0
SETTINGS = {"TOPWORK_BACKBONES": "minilm-l6-v2"}


@dataclass
class Found:
    """Findings of any run that kills. The lists are empty if every promise was kept."""

    acknowledged: int = 0
    orphaned_artifacts: int = 0
    lost: list[str] = field(default_factory=list)
    broken_rows: list[str] = field(default_factory=list)
    left_running: list[str] = field(default_factory=list)

    @property
    def failures(self) -> dict[str, list[str]]:
        """Every promise with the cases in which it was not kept."""
        return {
            "acknowledged and lost": self.lost,
            "rows without their artifact": self.broken_rows,
            "processes left running": self.left_running,
        }

    @property
    def counts(self) -> dict[str, int]:
        """How much happened, by the names of the fields in words."""
        found = asdict(self).items()
        return {name.replace("_", " "): value for name, value in found if isinstance(value, int)}

    @property
    def sound(self) -> bool:
        """True if every promise was kept."""
        return not any(self.failures.values())


@dataclass
class Kills(Found):
    """Findings of a run."""

    kills: int = 0
    killed_during_a_request: int = 0
    uploads: int = 0
    by_operation: dict[str, int] = field(default_factory=dict)
    reused_numbers: list[str] = field(default_factory=list)
    wrong_answers: list[str] = field(default_factory=list)
    came_back: list[str] = field(default_factory=list)
    without_outcome: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """See Found.counts."""
        return {**super().counts, **self.by_operation}

    @property
    def failures(self) -> dict[str, list[str]]:
        """See Found.failures."""
        return {
            **super().failures,
            "version numbers used twice": self.reused_numbers,
            "wrong answers": self.wrong_answers,
            "removed, and there again": self.came_back,
            "uploads without an outcome": self.without_outcome,
        }


def run(times: int, *, seed: int = 0, home: Path) -> Kills:
    """Kills the service `times` times. The home folder must be empty."""
    rng = random.Random(seed)
    found, said = Kills(), Said()
    for number in range(times):
        with Serving(home, environment=SETTINGS) as running:
            _look_over_http(running.url, said, found)
            stop = threading.Event()
            callers = [
                Caller(running.url, rng.getrandbits(32), f"{number}-{caller}", said, stop)
                for caller in range(CALLERS)
            ]
            threads = [threading.Thread(target=caller.run) for caller in callers]
            for thread in threads:
                thread.start()
            time.sleep(rng.uniform(0.05, LONGEST_SECONDS))
            during = said.answering
            running.kill()
            stop.set()
            for thread in threads:
                thread.join()
            found.kills += 1
            found.killed_during_a_request += during > 0
            wait_for_the_rest(running, found, REST_SECONDS)
        _look_into_the_files(home, said, found)
    with Serving(home, environment=SETTINGS) as running:
        _wait_for_the_jobs(running.url, said, found)
        _look_over_http(running.url, said, found)
    _look_into_the_files(home, said, found)
    found.acknowledged = sum(said.done.values())
    found.by_operation = dict(sorted(said.done.items()))
    found.wrong_answers = said.wrong
    return found


def _look_over_http(url: str, said: Said, found: Kills) -> None:
    with httpx.Client(base_url=url, timeout=60) as http:
        for adapter, numbers in said.versions.items():
            if len(set(numbers)) != len(numbers):
                found.reused_numbers.append(adapter)
            for version in (None, *said.newest(adapter)):
                answer = http.post("/predict", json=query(adapter, version, ASKED[0]))
                if answer.status_code != 200 or answer.json()["version"] < (version or max(numbers)):
                    found.lost.append(f"{adapter} version {version or 'live'}: {answer.text}")
                else:
                    said.compare(adapter, version, ASKED[0], answer.json())
        for adapter in said.gone:
            if http.get(f"/adapters/{adapter}").status_code != 404:
                found.came_back.append(adapter)


def _wait_for_the_jobs(url: str, said: Said, found: Kills) -> None:
    """Every upload that was acknowledged ends; the examples of those that succeeded must be there."""
    end = time.monotonic() + JOBS_SECONDS
    with httpx.Client(base_url=url, timeout=60) as http:
        for job, (adapter, examples) in said.jobs.items():
            while True:
                answer = http.get(f"/jobs/{job}")
                told = answer.json()
                if answer.status_code != 200 or told["finished_at"] is not None or time.monotonic() > end:
                    break
                time.sleep(0.1)
            ended = told.get("state") in ("succeeded", "failed")
            if not ended or (told["version"] is None) == (told["state"] == "succeeded"):
                found.without_outcome.append(str(told))
            elif told["state"] == "succeeded":
                found.uploads += 1
                said.add(adapter, told["version"], sorted(examples))
            elif told["error"]["code"] != "attempts_exhausted":
                found.without_outcome.append(str(told))


def look_into_the_files(
    home: Path, tenants: Iterable[str], examples: Mapping[tuple[str, str], set[str]], found: Found
) -> None:
    """Check without the service that every artifact named by a row is whole, and every example there.

    examples: their ids, by tenant and adapter.
    """
    registry, store = Registry(f"sqlite:///{home / 'topwork.db'}"), open_store(str(home / "artifacts"))
    try:
        referenced = set()
        for tenant in tenants:
            for record in registry.adapters(tenant):
                name = f"{tenant} {record.name}"
                kept = {example.id for example in registry.all_examples(record.uid)[1]}
                gone = examples.get((tenant, record.name), set()) - kept
                found.lost.extend(f"{name} example {example}" for example in sorted(gone))
                for artifact in registry.referenced(record.uid):
                    referenced.add(artifact.name)
                    try:
                        store.read(tenant, record.uid, artifact)
                    except StoreError as error:
                        found.broken_rows.append(f"{name}: {error}")
        found.orphaned_artifacts = sum(1 for stored in store.objects() if stored.name not in referenced)
    finally:
        registry.close()


def _look_into_the_files(home: Path, said: Said, found: Kills) -> None:
    examples = {(TENANT, adapter): ids for adapter, ids in said.examples.items()}
    look_into_the_files(home, [TENANT], examples, found)
    registry = Registry(f"sqlite:///{home / 'topwork.db'}")
    try:
        for record in registry.adapters(TENANT, limit=1_000):
            kept = {example.id for example in registry.all_examples(record.uid)[1]}
            found.came_back.extend(f"{record.name} {one}" for one in sorted(kept & said.removed[record.name]))
    finally:
        registry.close()


def kill_worker(running: Serving) -> None:
    """kill -9 of the process that does the service's jobs. Raises ProcessLookupError."""
    for pid in running.group():
        with suppress(FileNotFoundError, ProcessLookupError):
            if b"adapters.workers.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                return
    raise ProcessLookupError("The service has no worker.")


def wait_for_the_rest(running: Serving, found: Found, seconds: float) -> None:
    """Wait until the processes that the killed one had started have ended by themselves."""
    deadline = time.monotonic() + seconds
    while running.group():
        if time.monotonic() > deadline:
            found.left_running.append(str(running.group()))
            return
        time.sleep(0.02)


def conclude(report: Report, found: Found) -> int:
    """Writes what happened, and that no promise may be broken; the exit status."""
    report.add("What happened", table(["", ""], [[name, str(count)] for name, count in found.counts.items()]))
    for name, cases in found.failures.items():
        report.expect(name, len(cases), "<=", 0)
    report.data |= asdict(found)
    return report.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/kill.md and .json; 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability.kill", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = Report("kill", "Kills under mixed load")
    with tempfile.TemporaryDirectory() as home:
        found = run(options.times, seed=options.seed, home=Path(home))
    return conclude(report, found)


if __name__ == "__main__":
    raise SystemExit(main())
