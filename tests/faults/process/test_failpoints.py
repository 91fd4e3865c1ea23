"""A fault at each step of the flows: a kill, an I/O error, a full disk, five seconds of standstill.

Each has fired, and what was acknowledged is there, nothing refers to what is not, and the service goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.maintenance.inspection import Inspector
from adapters.registry.database import Database
from adapters.storage.open import open_store
from benchmarks.harness.service_process import Serving
from tests.faults import times
from tests.faults.process.failpoints import PLACES_FILE, Failpoint

PLACES = [
    f"{module}.{path}:{when}"
    for module, paths in json.loads(PLACES_FILE.read_text()).items()
    for path in paths
    for when in ("before", "after")
]
ACTIONS = ("kill", "EIO", "ENOSPC", "stall")
# Something of each kind, in usual runs.
USUAL = [
    ("adapters.storage.local.LocalStore._write:after", "kill"),
    ("adapters.storage.files.write_synced:before", "ENOSPC"),
    ("adapters.registry.statements.revision_rows.record_version:after", "EIO"),
    ("adapters.registry.registry.Registry.commit:after", "kill"),
    ("adapters.registry.statements.commit.promote:after", "EIO"),
    ("adapters.registry.registry.Registry.promote:after", "kill"),
    ("adapters.registry.statements.job_rows.held:before", "stall"),
    ("adapters.processes.frames.write_frame:before", "EIO"),
]
CASES = times(1, 0) * [(place, action) for place in PLACES for action in ACTIONS] or USUAL
# Refused for now, or gone; anything else of 5xx is a bug.
EXPECTED = {200, 202, 404, 409, 429, 503, 504, 507}
PATIENCE = 60.0


class Place:
    """A service that is started again when it was killed, and what it has acknowledged."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.failpoint = Failpoint(home / "failing")
        self.number = 0
        self.versions: dict[str, int] = {}
        self.uncertain: set[str] = set()
        self.statuses: set[int] = set()
        self._start()

    def _start(self) -> None:
        environment = {**self.failpoint.environment, "TOPWORK_BACKBONES": "minilm-l6-v2"}
        self.serving = Serving(self.home, environment=environment)
        self.http = httpx.Client(base_url=self.serving.url, timeout=30.0)

    def close(self) -> None:
        self.http.close()
        if self.serving.process.poll() is None:
            self.serving.stop()

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response | None:
        """The answer; None where the service was killed meanwhile, and then it runs again."""
        try:
            answer = self.http.request(method, path, **request)
        except httpx.HTTPError:
            assert self.serving.process.wait(30) != 0
            self.http.close()
            self._start()
            return None
        self.statuses.add(answer.status_code)
        assert answer.status_code in EXPECTED, f"{method} {path}: {answer.text}"
        return answer

    def adapt(self, name: str, first: int, count: int) -> bool:
        examples = [
            {
                "id": f"e{number}",
                "text": f"{'sunny' if number % 2 else 'rainy'} {number} {name}",
                "label": "rs"[number % 2],
            }
            for number in range(first, first + count)
        ]
        answer = self.ask("POST", "/adapt", json={"adapter": name, "examples": examples, "promote": "always"})
        if answer is None or answer.status_code != 200:
            return False
        version = answer.json()["version"]
        assert version > self.versions.get(name, 0), "a version's number was used again"
        self.versions[name] = version
        return True

    def work(self) -> None:
        """Something of each flow."""
        self.number += 1
        name = f"a{self.number}"
        self.adapt(name, 0, 6)
        self.adapt(name, 6, 2)
        self.ask("PATCH", f"/adapters/{name}/examples/e0", json={"excluded": True})
        self.ask("PUT", f"/adapters/{name}/aliases/live", json={"version": 1})
        self.ask("POST", f"/adapters/{name}/versions/1/restore")
        self.ask("POST", "/predict", json={"adapter": name, "inputs": [{"text": "sunny"}]})
        self.ask("POST", "/predict", json={"adapter": f"none{self.number}", "inputs": [{"text": "sunny"}]})
        texts = [f"{'hot' if one % 2 else 'cold'} {one}" for one in range(12)]
        lines = "".join(json.dumps({"text": text, "label": text[0]}) + "\n" for text in texts)
        headers = {"Content-Type": "application/x-ndjson"}
        self.ask("POST", f"/adapt?adapter=bulk{self.number % 3}", content=lines, headers=headers)
        old = f"a{self.number - 2}"
        if old in self.versions:
            del self.versions[old]
            self.ask("DELETE", f"/adapters/{old}")

    def settled(self) -> None:
        """Waits until it works again, and no job is open."""
        end = time.monotonic() + PATIENCE
        while not self.adapt("steady", 0, 4) or self._open_jobs():
            assert time.monotonic() < end, "it does not work again"
            time.sleep(0.1)

    def _open_jobs(self) -> bool:
        answer = self.ask("GET", "/jobs")
        assert answer is not None
        return any(job["finished_at"] is None for job in answer.json()["jobs"])

    def check(self) -> None:
        """Check that every acknowledged version answers, and every row has its file."""
        for name, version in self.versions.items():
            found = self.ask("GET", f"/adapters/{name}/versions")
            assert found is not None
            assert version in [one["version"] for one in found.json()["versions"]], name
            answer = self.ask("POST", "/predict", json={"adapter": name, "inputs": [{"text": "rainy 0"}]})
            assert answer is not None
            assert answer.json()["predictions"][0]["label"] in ("r", "s"), name
        database = Database(f"sqlite:///{self.home / 'topwork.db'}")
        inspector = Inspector(database, open_store(str(self.home / "artifacts")))
        found_in_database = list(inspector.database())
        damages = [damage for uid in inspector.uids() for damage in inspector.adapter(uid)[1]]
        database.close()
        assert (found_in_database, damages) == ([], [])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    found = Place(tmp_path_factory.mktemp("failing"))
    with suppress(ProcessLookupError):
        yield found
        found.close()


def test_there_are_enough_places() -> None:
    assert len(PLACES) >= 25


@pytest.mark.parametrize(("where", "action"), CASES, ids=lambda value: value)
def test_it_fires_and_is_survived(place: Place, where: str, action: str) -> None:
    place.settled()
    place.failpoint.arm(where, action)
    end = time.monotonic() + PATIENCE
    while not place.failpoint.fired:
        assert time.monotonic() < end, "nobody came there"
        place.work()
    place.settled()
    place.check()
