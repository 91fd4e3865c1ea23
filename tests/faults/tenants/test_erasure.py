"""Erased data leaves the database's pages, the store, temporary files and logs within 5 seconds."""

from __future__ import annotations

import base64
import json
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.harness.service_process import Serving
from tests.faults import times
from tests.faults.tenants.disk_scan import found_in

ADMIN = "0123456789abcdef0123456789abcdef"
SECONDS = 5.0
AT_ONCE = 4
Json = dict[str, Any]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    home = tmp_path_factory.mktemp("erasing")
    temporary = home / "tmp"
    temporary.mkdir()
    environment = {"TOPWORK_ADMIN_KEY": ADMIN, "TMPDIR": str(temporary)}
    with Serving(home, environment=environment) as found:
        yield found


class Canaried:
    """A tenant all of whose labels, texts, ids and notes hold its canary; its name does not."""

    def __init__(self, url: str) -> None:
        self.name = f"t-{uuid.uuid4().hex[:12]}"
        self.canary = f"canary{uuid.uuid4().hex}"
        self.operator = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60.0)
        self.post("/tenants", {"tenant": self.name}, self.operator)
        body = {"scopes": ["predict", "adapt"], "note": self.canary}
        key = self.post(f"/tenants/{self.name}/keys", body, self.operator).json()["key"]
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60.0)

    def post(self, path: str, body: Json, http: httpx.Client | None = None) -> httpx.Response:
        return (http or self.http).post(path, json=body)

    def examples(self, first: int, count: int) -> list[Json]:
        return [
            {
                "id": f"{self.canary}/{number}",
                "text": f"{'a fine' if number % 2 else 'a dull'} film {number} {self.canary}",
                "label": f"{'good' if number % 2 else 'bad'} {self.canary}",
            }
            for number in range(first, first + count)
        ]

    def live(self) -> None:
        """Does all that a tenant does."""
        assert self.post("/adapt", {"adapter": "films", "examples": self.examples(0, 12)}).status_code == 200
        assert self.post("/adapt", {"adapter": "plays", "examples": self.examples(50, 6)}).status_code == 200
        asked = {"adapter": "films", "explain": 2, "inputs": [{"text": f"a film {self.canary}"}]}
        assert self.canary in self.post("/predict", asked).text
        right = {"text": f"a film {self.canary}", "label": f"good {self.canary}"}
        assert self.post("/adapters/films/feedback", right).status_code == 200
        assert self.http.get(f"/adapters/films/examples/{self.canary}/1").status_code == 200
        assert self.http.get(f"/adapters/films/examples/{self.canary}/none").status_code == 404
        assert self.http.delete(f"/adapters/films/examples/{self.canary}/2").status_code == 200
        assert self.upload(200, 300).status_code == 202

    def upload(self, first: int, count: int) -> httpx.Response:
        lines = "\n".join(json.dumps(one) for one in self.examples(first, count))
        return self.http.post(
            "/adapt?adapter=films", content=lines, headers={"Content-Type": "application/x-ndjson"}
        )

    def go_on(self, until: threading.Event) -> set[int]:
        """Adapts, uploads and asks until it is told to stop; the statuses of what was answered."""
        statuses = set()
        number = 1_000
        while not until.is_set():
            number += 10
            body = {"adapter": f"new{number % 3}", "examples": self.examples(number, 4)}
            statuses.add(self.post("/adapt", body).status_code)
            if number % 50 == 0:
                statuses.add(self.upload(number, 40).status_code)
        return statuses

    def erase(self) -> Json:
        answer = self.operator.delete(f"/tenants/{self.name}")
        assert answer.status_code == 200, answer.text
        receipt: Json = answer.json()
        assert receipt["adapters"] >= 2
        assert receipt["keys"] == 1
        return receipt

    def close(self) -> None:
        self.http.close()
        self.operator.close()


def test_tenants_are_erased_while_they_go_on(serving: Serving) -> None:
    rounds = -(-times(200, 8) // AT_ONCE)
    for _ in range(rounds):
        tenants = [Canaried(serving.url) for _ in range(AT_ONCE)]
        with ThreadPoolExecutor(2 * AT_ONCE) as pool:
            list(pool.map(Canaried.live, tenants))
            until = threading.Event()
            going_on = [pool.submit(tenant.go_on, until) for tenant in tenants]
            canaries = [tenant.canary for tenant in tenants]
            try:
                time.sleep(0.3)
                assert found_in(serving.home, canaries), "the search finds what is there"
                list(pool.map(Canaried.erase, tenants))
                time.sleep(SECONDS)
                assert found_in(serving.home, canaries) == {}
            finally:
                until.set()
            for statuses in (one.result() for one in going_on):
                # Answered before, broken off, without an adapter, or without a key.
                assert statuses <= {200, 202, 401, 404, 409, 429}, statuses
                assert 401 in statuses
        for tenant in tenants:
            assert tenant.operator.get(f"/tenants/{tenant.name}").status_code == 404
            tenant.close()


def test_adapters_and_examples_are_erased(serving: Serving) -> None:
    tenant = Canaried(serving.url)
    for _ in range(times(20, 1)):
        tenant.canary = f"canary{uuid.uuid4().hex}"
        tenant.live()
        assert tenant.http.delete("/adapters/plays").json()["examples"] == 6
        while any(job["finished_at"] is None for job in tenant.http.get("/jobs").json()["jobs"]):
            time.sleep(0.2)
        receipt = tenant.http.delete("/adapters/films/examples?all=true").json()
        assert receipt["erasure"]
        time.sleep(SECONDS)
        # Versions from before are gone with their examples, and what jobs have reported of lines.
        assert found_in(serving.home, [tenant.canary]) == {}
        tenant.http.delete("/adapters/films")
        time.sleep(SECONDS)
        assert found_in(serving.home, [tenant.canary]) == {}
    tenant.close()


def test_the_search_finds_each_form(tmp_path: Path) -> None:
    for shift in range(3):
        encoded = base64.b64encode(b"y" * shift + b"some canary here, and more")
        (tmp_path / f"{shift}").write_bytes(b"before" + encoded + b"after")
    (tmp_path / "wide").write_bytes("some canary here".encode("utf-16-le"))
    (tmp_path / "some canary here").mkdir()
    assert len(found_in(tmp_path, ["some canary here"])) == 5
