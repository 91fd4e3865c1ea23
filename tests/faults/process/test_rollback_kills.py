"""A rollback, a restored version and an amended example: killed anywhere, all of it is there or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.harness.service_process import Serving
from tests.faults import times
from tests.faults.process.failpoints import Failpoint

ADAPTER = "/adapters/films"
Ask = Callable[..., httpx.Response]
CHANGES: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "roll back": ("PUT", f"{ADAPTER}/aliases/live", {"version": 1}),
    "restore": ("POST", f"{ADAPTER}/versions/1/restore", None),
    "amend": ("PATCH", f"{ADAPTER}/examples/e0", {"label": "r", "excluded": True, "promote": "always"}),
}
IN_COMMITS = [
    "adapters.registry.statements.commit.commit:before",
    "adapters.registry.statements.revision_rows.write_examples:after",
    "adapters.registry.statements.changes.announce:after",
    "adapters.registry.statements.commit.commit:after",
    "adapters.registry.registry.Registry.commit:after",
]
WHERE = {
    "roll back": [
        "adapters.registry.statements.commit.promote:before",
        "adapters.registry.statements.changes.announce:before",
        "adapters.registry.statements.commit.promote:after",
        "adapters.registry.registry.Registry.promote:after",
    ],
    "restore": IN_COMMITS,
    "amend": [*IN_COMMITS, "adapters.registry.statements.revision_rows.record_version:after"],
}
CASES = [(name, where) for name, places in WHERE.items() for where in places]
# One inside of each transaction and one behind it, in usual runs.
USUAL = [(name, where) for name, places in WHERE.items() for where in places[-3:-1] or places]


class Place:
    """A service that fails where it is told to, and is started again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.failpoint = Failpoint(home / "failing")
        self.start()

    def start(self) -> None:
        self.serving = Serving(
            self.home,
            environment={
                **self.failpoint.environment,
                "TOPWORK_BACKBONES": "minilm-l6-v2",
                "TOPWORK_WORKERS": "0",
            },
        )

    def caller(self, tenant: str) -> httpx.Client:
        return httpx.Client(base_url=self.serving.url, headers={"X-Tenant": tenant}, timeout=60.0)

    def ask(self, tenant: str, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        with self.caller(tenant) as http:
            answer = http.request(method, path, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer

    def spoil(self, tenant: str) -> None:
        """Version 1 of six examples; version 2 of two wrong ones beside them, and one with another label."""
        examples = [
            {"id": f"e{one}", "text": f"{'sunny' if one % 2 else 'rainy'} day {one}", "label": "rs"[one % 2]}
            for one in range(8)
        ]
        self.ask(tenant, "POST", "/adapt", {"adapter": "films", "examples": examples[:6]})
        examples[0]["label"], examples[6]["label"], examples[7]["label"] = "s", "s", "r"
        body = {"adapter": "films", "examples": [examples[0], *examples[6:]], "promote": "always"}
        assert self.ask(tenant, "POST", "/adapt", body).json()["live"]

    def state(self, tenant: str) -> tuple[Any, ...]:
        """All that one of the changes may change, and what answers."""
        adapter = self.ask(tenant, "GET", ADAPTER).json()
        held = adapter["rolled_back_at"] is not None
        examples = self.ask(tenant, "GET", f"{ADAPTER}/examples").json()["examples"]
        versions = self.ask(tenant, "GET", f"{ADAPTER}/versions").json()["versions"]
        body = {"adapter": "films", "inputs": [{"text": "sunny day 1"}]}
        return (
            (adapter["live"], held, adapter["revision"], adapter["examples"]),
            [(one["id"], one["label"], one["excluded"]) for one in examples],
            [(one["version"], one["live"], one["sha256"]) for one in versions],
            self.ask(tenant, "POST", "/predict", body).json()["version"],
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    found = Place(tmp_path_factory.mktemp("rollbacks"))
    yield found
    found.serving.stop()


@pytest.mark.parametrize(("name", "where"), times(1, 0) * CASES or USUAL, ids=lambda value: value)
def test_a_kill_leaves_what_was_before_or_what_comes_after(place: Place, name: str, where: str) -> None:
    case = CASES.index((name, where))
    killed, whole = f"killed-{case}", f"whole-{case}"
    method, path, body = CHANGES[name]
    for tenant in (killed, whole):
        place.spoil(tenant)
    before = place.state(killed)
    assert before == place.state(whole)
    place.ask(whole, method, path, body)
    after = place.state(whole)
    assert after != before
    place.failpoint.arm(where, "kill")
    with pytest.raises(httpx.TransportError):
        place.ask(killed, method, path, body, **{"Idempotency-Key": "one"})
    assert place.failpoint.fired
    assert place.serving.process.wait(30) != 0
    place.start()
    recorded = where.startswith("adapters.registry.registry.Registry") and where.endswith(":after")
    assert place.state(killed) == (after if recorded else before)
    # Sent again, it is done once.
    again = place.ask(killed, method, path, body, **{"Idempotency-Key": "one"})
    assert ("idempotency-replayed" in again.headers) == (recorded and name != "roll back")
    assert place.state(killed) == after
