"""Kills the service with SIGKILL during adapts, again and again, and looks for what was lost.

python -m benchmarks.kill [--times 200]

After each kill the database and the store are read without the service: no row may refer to an artifact that
is not there whole. After each restart every acknowledged version must be there and predict.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from adapters.records import KEPT_VERSIONS
from adapters.registry import Registry
from adapters.store import StoreError, open_store
from benchmarks.report import Report, table
from benchmarks.serving import Serving

ADAPTERS = 6
CALLERS = 3
WORDS = ("invoice", "holiday", "weather", "football")


@dataclass(slots=True)
class Kills:
    """What a run found. The lists are empty if nothing was lost."""

    kills: int = 0
    killed_during_an_adapt: int = 0
    acknowledged: int = 0
    orphaned_artifacts: int = 0
    lost: list[str] = field(default_factory=list)
    broken_rows: list[str] = field(default_factory=list)
    reused_numbers: list[str] = field(default_factory=list)
    left_running: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every promise was kept."""
        return not (self.lost or self.broken_rows or self.reused_numbers or self.left_running)


class _Acknowledged:
    """What the service has said yes to, by adapter. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.versions: dict[str, list[int]] = defaultdict(list)
        self.examples: dict[str, set[str]] = defaultdict(set)
        self.running = 0

    def add(self, adapter: str, version: int, examples: Sequence[str]) -> None:
        with self._lock:
            self.versions[adapter].append(version)
            self.examples[adapter].update(examples)

    def begin(self, change: int) -> None:
        with self._lock:
            self.running += change


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
            during = said.running
            running.kill()
            stop.set()
            for caller in callers:
                caller.join()
            found.kills += 1
            found.killed_during_an_adapt += during > 0
            _wait_for_the_rest(running, found)
        _look_into_the_files(home, said, found)
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
            said.begin(+1)
            try:
                answer = client.post(
                    "/adapt", json={"adapter": adapter, "promote": "always", "examples": examples}
                )
            except httpx.TransportError:
                return
            finally:
                said.begin(-1)
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


def _look_into_the_files(home: Path, said: _Acknowledged, found: Kills) -> None:
    registry, store = Registry(f"sqlite:///{home / 'topwork.db'}"), open_store(str(home / "artifacts"))
    try:
        referenced = set()
        for record in registry.adapters("default"):
            _, examples = registry.all_examples(record.uid)
            gone = said.examples[record.name] - {example.id for example in examples}
            found.lost.extend(f"{record.name} example {example}" for example in sorted(gone))
            for artifact in registry.referenced(record.uid):
                referenced.add(artifact.name)
                try:
                    store.read("default", record.uid, artifact)
                except StoreError as error:
                    found.broken_rows.append(f"{record.name}: {error}")
        found.orphaned_artifacts = sum(1 for stored in store.objects() if stored.name not in referenced)
    finally:
        registry.close()


def _wait_for_the_rest(running: Serving, found: Kills) -> None:
    """What the killed process had started must end by itself."""
    deadline = time.monotonic() + 10
    while running.group():
        if time.monotonic() > deadline:
            found.left_running.append(str(running.group()))
            return
        time.sleep(0.02)


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
    counts = {
        "kills": found.kills,
        "kills while an adapt was being answered": found.killed_during_an_adapt,
        "adapts acknowledged": found.acknowledged,
        "artifacts left for the sweep": found.orphaned_artifacts,
    }
    report.add("What happened", table(["", ""], [[name, str(count)] for name, count in counts.items()]))
    failures = {
        "acknowledged and lost": found.lost,
        "rows without their artifact": found.broken_rows,
        "version numbers used twice": found.reused_numbers,
        "processes left running": found.left_running,
    }
    for name, cases in failures.items():
        report.expect(name, len(cases), "<=", 0)
        report.data[name] = cases
    report.data |= counts
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
