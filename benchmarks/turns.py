"""What giant pictures and long texts of one tenant cost the others: latency alone and beside them, in turn.

python -m benchmarks.turns [part ...]
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from benchmarks import client
from benchmarks.asked import asked
from benchmarks.load import Load, Order, Round
from benchmarks.report import Report, Spread, table
from benchmarks.scenes import TENANT, Scene, image_scene, text_scene
from benchmarks.serving import Serving

ROUNDS = 4
SECONDS = 10.0
RATE = 30.0
# Requests at the same time, each of another tenant, with as many inputs as are allowed.
ATTACKERS = 2
INPUTS = 128
SLOWER = 3.0
SMALL = (400, 300)
GIANT = (7_000, 7_000)
CHARACTERS = 100_000


@dataclass(frozen=True, slots=True)
class Attack:
    """What is sent to /embed, again and again the same input."""

    backbone: str
    input: dict[str, str]

    def body(self) -> bytes:
        """A whole request."""
        return json.dumps({"backbone": self.backbone, "inputs": [self.input] * INPUTS}).encode()


def _giant() -> Attack:
    buffer = io.BytesIO()
    Image.new("RGB", GIANT, "white").save(buffer, "PNG")
    return Attack("efficientnet-lite0", {"image": base64.b64encode(buffer.getvalue()).decode()})


def _text(start: str, rest: str) -> Attack:
    return Attack("minilm-l6-v2", {"text": (start + rest * CHARACTERS)[:CHARACTERS]})


ATTACKS: dict[str, Callable[[], Attack]] = {
    "giant pictures": _giant,
    "a long word and signs": lambda: _text("a" * 5_000, "\u4e2d"),
    "one word of Hangul": lambda: _text("", "\ud55c"),
    "ordinary long texts": lambda: _text("", "A word, and another one. "),
}


class Attackers:
    """Tenants that send one request each at the same time."""

    def __init__(self, url: str, body: bytes) -> None:
        self.seconds: list[float] = []
        self.statuses: list[int] = []
        self._threads = [
            threading.Thread(target=self._send, args=(url, f"attacker{number}", body))
            for number in range(ATTACKERS)
        ]
        for thread in self._threads:
            thread.start()

    def _send(self, url: str, tenant: str, body: bytes) -> None:
        headers = {"X-Tenant": tenant, "Content-Type": "application/json"}
        begun = time.perf_counter()
        answer = httpx.post(f"{url}/embed", content=body, headers=headers, timeout=600)
        self.seconds.append(time.perf_counter() - begun)
        self.statuses.append(answer.status_code)

    def join(self) -> None:
        """Waits until all are answered."""
        for thread in self._threads:
            thread.join()


def teach(url: str, scene: Scene) -> None:
    """Makes the adapter of a scene."""
    examples = [client.as_example(sample) for sample in scene.taught]
    httpx.post(
        f"{url}/adapt",
        json={"adapter": scene.adapter, "backbone": scene.backbone, "examples": examples},
        headers={"X-Tenant": TENANT},
        timeout=600,
    ).raise_for_status()


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/turns.md and .json; 1 if a target is missed."""
    options = asked("turns", __doc__, ATTACKS, arguments)
    report = Report("turns", "Giant pictures and long texts beside others")
    scenes = [text_scene(16, options.data), image_scene(SMALL, options.data)]
    with (
        tempfile.TemporaryDirectory(prefix="topwork-bench-") as home,
        Serving(Path(home)) as serving,
        Load(serving.url) as quiet,
    ):
        for scene in scenes:
            teach(serving.url, scene)
        for part in options.parts:
            body = ATTACKS[part]().body()
            for scene in scenes:
                order = Order(scene.forms()["raw"], 16, SECONDS, rate=RATE)
                alone, beside, attacks = [], [], []
                quiet.run(order)
                for _ in range(ROUNDS):
                    alone.append(quiet.run(order))
                    attackers = Attackers(serving.url, body)
                    beside.append(quiet.run(order))
                    attackers.join()
                    attacks.append(attackers)
                _tell(report, f"{scene.name} beside {part}", alone, beside, attacks)
    return report.finish()


def _tell(
    report: Report, title: str, alone: list[Round], beside: list[Round], attacks: list[Attackers]
) -> None:
    def milliseconds(rounds: list[Round], quantile: float) -> Spread:
        return Spread(tuple(1e3 * float(np.quantile(one.latencies, quantile)) for one in rounds))

    rows = [
        [name, *(milliseconds(rounds, quantile).text(".1f") for quantile in (0.5, 0.99, 1.0))]
        for name, rounds in (("alone", alone), ("beside", beside))
    ]
    ratio = milliseconds(beside, 0.99).median / milliseconds(alone, 0.99).median
    refused = sum(len(one.refused) + one.late for one in (*alone, *beside))
    report.expect(f"{title}: p99 over that alone", ratio, "<=", SLOWER)
    report.expect(f"{title}: requests of the others refused or not sent", refused, "<=", 0)
    took = Spread(tuple(second for one in attacks for second in one.seconds))
    statuses = sorted({status for one in attacks for status in one.statuses})
    note = f"The {ATTACKERS} requests of {INPUTS} took {took.text('.1f')} s, and were answered {statuses}."
    report.add(f"{title}, ms", f"{table(['', 'p50', 'p99', 'worst'], rows)}\n\n{note}")
    report.data[title] = {
        "alone_p99_ms": milliseconds(alone, 0.99).values,
        "beside_p99_ms": milliseconds(beside, 0.99).values,
        "attack_seconds": took.values,
    }


if __name__ == "__main__":
    raise SystemExit(main())
