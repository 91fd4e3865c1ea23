"""A tenant far above its quota: the others' latency alone and beside it, in turn.

python -m benchmarks.serving.neighbours
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np

from benchmarks.harness import client
from benchmarks.harness.caller import Request
from benchmarks.harness.load import Load, Order, Round
from benchmarks.harness.options import asked
from benchmarks.harness.payloads import Scene, text_scene
from benchmarks.harness.report import Report, Spread, table
from benchmarks.harness.service_process import Serving

ROUNDS = 6
SECONDS = 8.0
# Requests a second, of one text each: a fifth of what two cores do, and a hundred times the quota.
QUIET_RATE = 80.0
QUOTA = 5.0
LOUD_RATE = 100 * QUOTA
SLOWER = 1.5


class Operator:
    """Makes tenants with keys at a service that asks for them."""

    def __init__(self, url: str, admin_key: str) -> None:
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {admin_key}"}, timeout=120)

    def key_of(self, tenant: str, quotas: dict[str, float]) -> str:
        """The key of a new tenant."""
        self._call("POST", "/tenants", {"tenant": tenant})
        self._call("PUT", f"/tenants/{tenant}/quotas", quotas)
        made = self._call("POST", f"/tenants/{tenant}/keys", {"scopes": ["predict", "adapt"]})
        return str(made.json()["key"])

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def _call(self, method: str, path: str, body: object) -> httpx.Response:
        return self._http.request(method, path, json=body).raise_for_status()


def _with_key(scene: Scene, key: str) -> list[Request]:
    return [
        replace(one, headers={"Content-Type": one.headers["Content-Type"], "Authorization": f"Bearer {key}"})
        for one in scene.forms()["raw"]
    ]


def _teach(url: str, key: str, scene: Scene) -> None:
    examples = [client.as_example(sample) for sample in scene.taught]
    httpx.post(
        f"{url}/adapt",
        json={"adapter": scene.adapter, "backbone": scene.backbone, "examples": examples},
        headers={"Authorization": f"Bearer {key}"},
        timeout=120,
    ).raise_for_status()


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/neighbours.md and .json; 1 if a target is missed."""
    options = asked(__doc__, (), arguments)
    report = Report("neighbours", "One tenant far above its quota")
    scene = text_scene(16, options.data)
    admin_key = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="topwork-bench-") as home,
        Serving(Path(home), environment={"TOPWORK_ADMIN_KEY": admin_key}) as serving,
        Load(serving.url) as quiet,
        Load(serving.url) as loud,
    ):
        operator = Operator(serving.url, admin_key)
        keys = {
            "quiet": operator.key_of("quiet", {}),
            "loud": operator.key_of("loud", {"items_per_second": QUOTA}),
        }
        operator.close()
        for key in keys.values():
            _teach(serving.url, key, scene)
        order = Order(_with_key(scene, keys["quiet"]), 32, SECONDS, rate=QUIET_RATE)
        noise = Order(_with_key(scene, keys["loud"]), 64, SECONDS, rate=LOUD_RATE)
        alone, beside, theirs = [], [], []
        for number in range(ROUNDS + 1):
            first = quiet.run(order)
            loud.begin(noise)
            second = quiet.run(order)
            other = loud.end()
            if number:  # the first is a warm-up
                alone.append(first)
                beside.append(second)
                theirs.append(other)
    _tell(report, alone, beside, theirs)
    return report.finish()


def _tell(report: Report, alone: list[Round], beside: list[Round], theirs: list[Round]) -> None:
    def milliseconds(rounds: list[Round], quantile: float) -> Spread:
        return Spread(tuple(1e3 * float(np.quantile(one.latencies, quantile)) for one in rounds))

    rows = [
        [name, milliseconds(rounds, 0.5).text(".2f"), milliseconds(rounds, 0.99).text(".2f")]
        for name, rounds in (("alone", alone), ("beside the other", beside))
    ]
    ratio = milliseconds(beside, 0.99).median / milliseconds(alone, 0.99).median
    refused = sum(len(one.refused) + one.late for one in (*alone, *beside))
    through = Spread(tuple(len(one.latencies) / SECONDS for one in theirs))
    unadvised = sum(len(one.refused) - one.advised for one in theirs)
    report.expect("p99 beside a tenant at 100 times its quota, over alone", ratio, "<=", SLOWER)
    report.expect("requests of the others that were refused or not sent", refused, "<=", 0)
    # Two seconds of the quota were saved up, and a request that is let in may be the last but one.
    report.expect("its requests a second that came through", through.median, "<=", 1.5 * QUOTA)
    report.expect("its refusals without Retry-After", unadvised, "<=", 0)
    note = (
        f"{QUIET_RATE:.0f} texts a second by the others; {LOUD_RATE:.0f} by one with a quota of {QUOTA:.0f}."
    )
    report.add("The others' latency, ms", f"{table(['', 'p50', 'p99'], rows)}\n\n{note}")
    report.data["p99_ms"] = {
        "alone": milliseconds(alone, 0.99).values,
        "beside": milliseconds(beside, 0.99).values,
    }
    report.data["through_per_second"] = through.values


if __name__ == "__main__":
    raise SystemExit(main())
