"""Twenty minutes of a thousand tenants at seven tenths of the peak: memory, descriptors and threads.

python -m benchmarks.serving.tenants
"""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx
import numpy as np

from benchmarks.harness import client
from benchmarks.harness.caller import Request
from benchmarks.harness.load import Load, Order
from benchmarks.harness.options import asked
from benchmarks.harness.payloads import Scene, text_scene
from benchmarks.harness.report import Report, Spread, table
from benchmarks.harness.service_process import Serving, resident
from benchmarks.serving.neighbours import Operator

TENANTS = 1_000
MINUTES = 20
SHARE = 0.7
CONNECTIONS = 64
# Requests in turn: of each tenant several, in random order.
REQUESTS = 20_000
# Minutes until queues, caches and heaps have found their size.
SETTLING = 4
SAMPLES = 6
ADAPT_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/tenants.md and .json; 1 if a target is missed."""
    options = asked(__doc__, (), arguments)
    report = Report("tenants", "A thousand tenants for twenty minutes")
    scene = text_scene(16, options.data)
    admin_key = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="topwork-bench-") as home,
        Serving(Path(home), environment={"TOPWORK_ADMIN_KEY": admin_key}) as serving,
        Load(serving.url) as load,
        Load(serving.url) as teaching,
    ):
        keys = _tenants(serving.url, admin_key, scene)
        asking = _predicts(scene, keys)
        peak = Spread(tuple(load.run(Order(asking, 32, 3.0)).checked().rate for _ in range(5)))
        adapts = Order(_adapts(scene, keys), 2, 60.0, rate=1 / ADAPT_SECONDS)
        order = Order(asking, CONNECTIONS, 60.0, rate=SHARE * peak.median)
        rows, samples = [], []
        for minute in range(1, MINUTES + 1):
            load.begin(order)
            teaching.begin(adapts)
            found = []
            for _ in range(SAMPLES):
                time.sleep(60.0 / SAMPLES - 1.0)
                found.append(_sample(serving.process.pid))
            answers, taught = load.end().checked(), teaching.end().checked()
            samples.append([median(one[place] for one in found) for place in range(3)])
            times = 1e3 * np.array(answers.latencies)
            rows.append(
                [str(minute), str(len(times)), str(len(taught.latencies)), f"{np.median(times):.2f}",
                 f"{np.quantile(times, 0.99):.1f}", *(f"{value:.1f}" for value in samples[-1])]
            )  # fmt: skip
    _tell(report, rows, samples, peak)
    return report.finish()


def _tenants(url: str, admin_key: str, scene: Scene) -> list[str]:
    """Makes the tenants, each with a key and an adapter of eight examples of its own."""
    examples = [client.as_example(sample) for sample in scene.taught]

    def make(number: int) -> str:
        operator = Operator(url, admin_key)
        key = operator.key_of(f"tenant-{number}", {})
        operator.close()
        start = 8 * number % (len(examples) - 64)
        _adapt(url, key, scene, examples[start : start + 64])
        return key

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(make, range(TENANTS)))


def _adapt(url: str, key: str, scene: Scene, examples: Sequence[object]) -> None:
    body = {"adapter": scene.adapter, "backbone": scene.backbone, "examples": examples}
    httpx.post(f"{url}/adapt", json=body, headers=_bearer(key), timeout=120).raise_for_status()


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _predicts(scene: Scene, keys: Sequence[str]) -> list[Request]:
    raw = scene.forms()["raw"]
    random = np.random.default_rng(0)
    return [
        Request(
            "POST",
            f"/predict?adapter={scene.adapter}",
            raw[int(random.integers(len(raw)))].body,
            {"Content-Type": "text/plain"} | _bearer(keys[int(number)]),
        )
        for number in random.integers(0, len(keys), REQUESTS)
    ]


def _adapts(scene: Scene, keys: Sequence[str]) -> list[Request]:
    """The same few examples again and again: what is kept stays as much as it is."""
    examples = [client.as_example(sample) for sample in scene.taught[:8]]
    body = json.dumps({"adapter": scene.adapter, "examples": examples}).encode()
    headers = {"Content-Type": "application/json"}
    return [Request("POST", "/adapt", body, headers | _bearer(key)) for key in keys]


def _sample(pid: int) -> tuple[float, float, float]:
    """Megabytes of resident memory, open descriptors, threads."""
    threads = next(
        int(line.split()[1])
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("Threads:")
    )
    return resident(pid) / 1e6, float(len(list(Path(f"/proc/{pid}/fd").iterdir()))), float(threads)


def _tell(report: Report, rows: list[list[str]], samples: list[list[float]], peak: Spread) -> None:
    memory, descriptors, threads = (np.array(values)[SETTLING:] for values in zip(*samples, strict=True))
    minutes = np.arange(len(memory))
    slope = 10.0 * float(np.polyfit(minutes, memory, 1)[0])
    report.data["samples"] = samples
    report.expect("memory gained in ten minutes", slope, "<=", 1.0, " MB")
    for name, values in (("descriptors", descriptors), ("threads", threads)):
        gained = 10.0 * float(np.polyfit(minutes, values, 1)[0])
        report.data[name] = values.tolist()
        report.expect(f"{name} gained in ten minutes", gained, "<=", 1.0)
    head = ["minute", "answers", "adapts", "p50, ms", "p99", "memory, MB", "descriptors", "threads"]
    note = (
        f"{TENANTS:,} tenants with a key and an adapter each, in random order at {SHARE:.0%} of the peak "
        f"({peak.text('.0f')} texts a second), one of them adapting every second."
    )
    report.add("Minute by minute", f"{note}\n\n{table(head, rows)}")


if __name__ == "__main__":
    raise SystemExit(main())
