"""A first start on a busy machine that turns quiet, beside one on a quiet one: the latency of a lone text.

python -m benchmarks.serving.first_start

Run it on a quiet machine: it makes the other load itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.harness import client
from benchmarks.harness.caller import Line, Request
from benchmarks.harness.options import asked
from benchmarks.harness.payloads import TENANT, text_scene
from benchmarks.harness.report import Report, Spread, table
from benchmarks.harness.service_process import Serving
from models.store.exports import find

BACKBONES = ("efficientnet-lite0", "minilm-l6-v2")
TEXTS = "minilm-l6-v2"
BUSY = 2
# Time until the plans are confirmed, counted from when the machine is quiet.
SECONDS = 600.0
ROUNDS = 12
REQUESTS = 150
SLOWER = 1.10


@contextmanager
def busy() -> Iterator[None]:
    """Processes that each want a core."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def exports(home: Path) -> Path:
    """A model store with the exported backbones, of which nothing has been measured."""
    for name in BACKBONES:
        folder = find(name)
        if folder is None:
            raise SystemExit(f"{name} is not exported; run `python -m models.export`")
        target = home / "models" / folder.parent.name
        shutil.copytree(folder, target / folder.name, ignore=shutil.ignore_patterns("plan.json"))
        shutil.copy(folder.parent / "latest", target / "latest")
    return home


def plans(url: str) -> dict[str, dict[str, Any]]:
    """How each backbone runs, as the service tells."""
    told = httpx.get(f"{url}/backbones", timeout=60).raise_for_status().json()
    return {one["name"]: one["plan"] for one in told["backbones"]}


def confirmed(url: str) -> float:
    """Seconds until all plans are confirmed, or those that were waited."""
    begun = time.monotonic()
    while time.monotonic() - begun < SECONDS:
        if all(plan["confirmed"] for plan in plans(url).values()):
            break
        time.sleep(1.0)
    return time.monotonic() - begun


def lone_text(line: Line, requests: Sequence[Request]) -> float:
    """The median of some seconds, each of a text that comes when nothing else does."""
    return median(line.seconds(requests[number % len(requests)]) for number in range(REQUESTS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/first_start.md and .json; 1 if a target is missed."""
    options = asked(__doc__, (), arguments)
    report = Report("first_start", "A first start on a busy machine")
    scene = text_scene(16, options.data)
    requests = scene.forms()["raw"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="topwork-bench-")))
        urls, first, waited = {}, {}, {}
        for name in ("started busy", "started quiet"):
            home = folder / name.split()[1]
            settings = {
                "BENTOML_HOME": str(exports(home / "bentoml")),
                "TOPWORK_BACKBONES": ",".join(BACKBONES),
            }
            with busy() if name == "started busy" else ExitStack():
                service = stack.enter_context(Serving(home, environment=settings))
                first[name] = plans(service.url)
            urls[name] = service.url
            waited[name] = confirmed(service.url)
        last = {name: plans(url) for name, url in urls.items()}
        for url in urls.values():
            client.Client(client.Server(url), TENANT).adapt(scene.adapter, scene.taught, scene.backbone)
        lines = {name: Line(url) for name, url in urls.items()}
        for line in lines.values():
            lone_text(line, requests)
        found: dict[str, list[float]] = {name: [] for name in lines}
        for number in range(ROUNDS):
            for name in sorted(lines, reverse=bool(number % 2)):
                found[name].append(1e3 * lone_text(lines[name], requests))
    spreads = {name: Spread(tuple(values)) for name, values in found.items()}
    ratio = spreads["started busy"].median / spreads["started quiet"].median
    sure = all(plan["confirmed"] for told in last.values() for plan in told.values())
    report.expect("seconds until its plans were confirmed", waited["started busy"], "<=", SECONDS)
    report.expect("services with all plans confirmed, of both", float(sure), ">=", 1)
    report.expect("a lone text where it started busy, over where it started quiet", ratio, "<=", SLOWER)
    rows = [
        [
            name,
            _told(first[name][TEXTS]),
            _told(last[name][TEXTS]),
            f"{waited[name]:.0f}",
            spreads[name].text(".2f"),
        ]
        for name in lines
    ]
    head = ["", "plan at first", "plan at last", "confirmed after, s", "lone text, ms"]
    report.add("Texts of 16 tokens, one after the other", table(head, rows))
    report.data |= {"first": first, "last": last, "milliseconds": found, "cores": os.cpu_count()}
    return report.finish()


def _told(plan: dict[str, Any]) -> str:
    beside = f"{plan['runs_beside']} × {plan['threads_beside']}"
    ways = f"{plan['threads_alone']} alone, {beside}, batch {plan['batch']}"
    return ways if plan["confirmed"] else f"{ways}, in doubt"


if __name__ == "__main__":
    raise SystemExit(main())
