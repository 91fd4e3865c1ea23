"""Kills the service with SIGKILL during adapts, again and again, and looks for what was lost.

python -m benchmarks.kill [--times 200]

After each kill the database and the store are read without the service: no row may refer to an artifact that
is not there whole. After each restart every acknowledged version must be there and predict.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from adapters.records import KEPT_VERSIONS
from adapters.registry import Registry
from adapters.store import StoreError, open_store
from benchmarks.report import Report, table
from benchmarks.serving import Serving

TENANT = "default"
ADAPTERS = 6
CALLERS = 3
REST_SECONDS = 10.0
WORDS = ("invoice", "holiday", "weather", "football")


@dataclass
class Found:
    """What any run that kills may find. The lists are empty if every promise was kept."""

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
        """Whether every promise was kept."""
        return not any(self.failures.values())


@dataclass
class Kills(Found):
    """What a run found."""

    kills: int = 0
    killed_during_an_adapt: int = 0
    reused_numbers: list[str] = field(default_factory=list)

    @property
    def failures(self) -> dict[str, list[str]]:
        """See Found.failures."""
        return {**super().failures, "version numbers used twice": self.reused_numbers}


class Asked:
    """How many requests are about to be answered. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answering = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """A request, meanwhile."""
        with self.lock:
            self.answering += 1
        try:
            yield
        finally:
            with self.lock:
                self.answering -= 1


class _Acknowledged(Asked):
    """What the service has said yes to, by adapter; examples by tenant and adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: dict[str, list[int]] = defaultdict(list)
        self.examples: dict[tuple[str, str], set[str]] = defaultdict(set)

    def add(self, adapter: str, version: int, examples: Sequence[str]) -> None:
        with self.lock:
            self.versions[adapter].append(version)
            self.examples[TENANT, adapter].update(examples)


def run(times: int, *, seed: int = 0, home: Path) -> Kills:
    """Kills the service `times` times. The home folder must be empty."""
    rng = random.Random(seed)
    found, said = Kills(), _Acknowledged()
    for number in range(times):
        with Serving(home, environment={"TOPWORK_BACKBONES": "minilm-l6-v2"}) as running:
            _look_over_http(running.url, said, found)
            stop = threading.Event()
            callers = [
                threading.Thread(
                    target=_adapt, args=(running.url, rng.getrandbits(32), f"{number}-{caller}", said, stop)
                )
                for caller in range(CALLERS)
            ]
            for caller in callers:
                caller.start()
            time.sleep(rng.uniform(0.05, 1.0))
            during = said.answering
            running.kill()
            stop.set()
            for caller in callers:
                caller.join()
            found.kills += 1
            found.killed_during_an_adapt += during > 0
            wait_for_the_rest(running, found, REST_SECONDS)
        look_into_the_files(home, [TENANT], said.examples, found)
    with Serving(home, environment={"TOPWORK_BACKBONES": "minilm-l6-v2"}) as running:
        _look_over_http(running.url, said, found)
    found.acknowledged = sum(len(numbers) for numbers in said.versions.values())
    return found


def _adapt(url: str, seed: int, prefix: str, said: _Acknowledged, stop: threading.Event) -> None:
    """Adapts until the service is gone; notes only what it acknowledged."""
    rng = random.Random(seed)
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(10_000):
            if stop.is_set():
                return
            adapter = f"a{rng.randrange(ADAPTERS)}"
            examples = [
                {"id": f"{prefix}-{number}-{word}", "text": f"{word} {rng.random()}", "label": word}
                for word in rng.sample(WORDS, 2)
            ]
            body = {"adapter": adapter, "promote": "always", "examples": examples}
            try:
                with said.one():
                    answer = client.post("/adapt", json=body)
            except httpx.TransportError:
                return
            if answer.status_code == 200:
                said.add(adapter, answer.json()["version"], [example["id"] for example in examples])
            elif answer.status_code not in (409, 429, 503):
                raise AssertionError(answer.text)


def _look_over_http(url: str, said: _Acknowledged, found: Kills) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        for adapter, numbers in said.versions.items():
            if len(set(numbers)) != len(numbers):
                found.reused_numbers.append(adapter)
            kept = sorted(numbers)[-KEPT_VERSIONS // 2 :]
            for version in kept:
                query: dict[str, Any] = {
                    "adapter": adapter,
                    "version": version,
                    "inputs": [{"text": "a holiday"}],
                }
                answer = client.post("/predict", json=query)
                if answer.status_code != 200 or answer.json()["version"] != version:
                    found.lost.append(f"{adapter} version {version}: {answer.text}")
            live = client.post("/predict", json={"adapter": adapter, "inputs": [{"text": "a holiday"}]})
            if live.status_code != 200 or live.json()["version"] < max(numbers):
                found.lost.append(f"{adapter} live: {live.text}")


def look_into_the_files(
    home: Path, tenants: Iterable[str], examples: Mapping[tuple[str, str], set[str]], found: Found
) -> None:
    """Without the service: is every artifact that a row names there whole, and every one of the examples?

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


def kill_worker(running: Serving) -> None:
    """kill -9 of the process that does the service's jobs. Raises ProcessLookupError."""
    for pid in running.group():
        with suppress(FileNotFoundError, ProcessLookupError):
            if b"adapters.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                return
    raise ProcessLookupError("The service has no worker.")


def wait_for_the_rest(running: Serving, found: Found, seconds: float) -> None:
    """What the killed process had started must end by itself."""
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
        prog="python -m benchmarks.kill", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = Report("kill", "Kills during adapts")
    with tempfile.TemporaryDirectory() as home:
        found = run(options.times, seed=options.seed, home=Path(home))
    return conclude(report, found)


if __name__ == "__main__":
    raise SystemExit(main())
