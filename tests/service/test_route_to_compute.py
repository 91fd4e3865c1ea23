"""How many of our modules one request goes through, in the service's process and in the fitting process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.harness.service_process import ROOT, Serving
from tests.support.service.client import BLAME, PRAISE, Caller

TRACE = ROOT / "tests" / "support" / "service" / "trace"
ADMIN = "0123456789abcdef0123456789abcdef"
# A module more on the way of every request is a decision: see docs/decisions.md#doors.
# Today 43 to 46, and 106.
PREDICT, ADAPT = 46, 106
TIMES = 8
PAUSE_SECONDS = 0.2  # between two requests
LOG_SECONDS = 0.05  # until an answered request is in the logs
# These modules watch processes and threads, and run without a request too.
BY_THEMSELVES = {
    "adapters/jobs/lease",
    "adapters/workers/supervisor",
    "adapters/workers/worker",
    "adapters/processes/heartbeat",
    "models/batching/stall_detector",
    "service/monitoring/backbone_monitor",
    "service/server/connections",
}

Call = tuple[str, str]
"""A module and the name of a function in it."""


class Traced:
    """A tenant of a service, all of whose processes record what they run."""

    def __init__(self, serving: Serving, traces: Path, caller: Caller) -> None:
        self.serving = serving
        self.caller = caller
        self._traces = traces

    def calls(self, begin: float, end: float) -> set[Call]:
        """What ran between two times of the monotonic clock."""
        found = set()
        for file in self._traces.iterdir():
            for line in file.read_text().splitlines():
                at, module, function = line.split(" ", 2)
                if begin * 1e3 <= int(at) <= end * 1e3:
                    found.add((module, function))
        return found

    def modules(self, request: Callable[[int], object]) -> set[str]:
        """The modules that run while each of several requests is answered.

        A module runs if one of its functions is called, or goes on, in any thread of any process. What also
        runs without a request counts, for a request may need it; only what no request can need does not.
        """
        windows = []
        for number in range(TIMES + 1):
            time.sleep(PAUSE_SECONDS)
            begin = time.monotonic()
            request(number)
            time.sleep(LOG_SECONDS)
            windows.append({module for module, _ in self.calls(begin, time.monotonic())})
        # The first request reads keys again and the like, so its modules do not count.
        return set.intersection(*windows[1:]) - BY_THEMSELVES


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("traced")
    traces = folder / "traces"
    traces.mkdir()
    environment = {
        "PYTHONPATH": str(TRACE),
        "TOPWORK_TEST_ROOT": str(ROOT),
        "TOPWORK_TEST_TRACES": str(traces),
        "TOPWORK_ADMIN_KEY": ADMIN,
        "TOPWORK_BACKBONES": "minilm-l6-v2",
    }
    with Serving(folder / "home", environment=environment) as serving:
        operator, tenant = Caller(serving.url), Caller(serving.url)
        with operator.http, tenant.http:
            operator.http.headers["Authorization"] = f"Bearer {ADMIN}"
            del operator.http.headers["X-Tenant"], tenant.http.headers["X-Tenant"]
            operator.call("POST", "/tenants", 201, json={"tenant": "acme"})
            key = operator.call("POST", "/tenants/acme/keys", 201, json={"scopes": ["predict", "adapt"]})
            tenant.http.headers["Authorization"] = f"Bearer {key['key']}"
            found = Traced(serving, traces, tenant)
            adapt(found, "warm")
            predict(found, 0)
            yield found


def adapt(traced: Traced, adapter: str) -> None:
    examples = [
        {"text": f"{text} {adapter}", "label": label} for text, label in ((PRAISE[0], "a"), (BLAME[0], "b"))
    ]
    traced.caller.adapt(adapter, examples)


def predict(traced: Traced, number: int) -> None:
    traced.caller.predict("warm", [{"text": f"{PRAISE[1]} {number} {time.monotonic()}"}])


def test_a_prediction_goes_through_few_modules(traced: Traced) -> None:
    found = traced.modules(lambda number: predict(traced, number))
    # Every prediction needs these modules. If one is missing, the processes are not recorded.
    assert {"service/server/protocol", "service/api/predict", "models/backbone"} <= found
    assert len(found) <= PREDICT, sorted(found)


def test_learning_goes_through_few_modules(traced: Traced) -> None:
    found = traced.modules(lambda number: adapt(traced, f"new-{number}"))
    assert {
        "service/api/adapt",
        "adapters/processes/fit_server",
        "adapters/registry/statements/commit",
    } <= found
    assert len(found) <= ADAPT, sorted(found)
