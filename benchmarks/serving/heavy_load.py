"""The service under more requests than it can answer, and near its limit for minutes: parts of speed.py."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.harness.client import Server
from benchmarks.harness.contenders import BareLoop
from benchmarks.harness.load import Load, Order, Round
from benchmarks.harness.payloads import image_scene, text_scene
from benchmarks.harness.report import Report, Spread, table
from benchmarks.harness.service_process import resident

ROUNDS = 5  # in which the peak is measured
OVERLOADS = (2, 5)
OVERLOAD_CONNECTIONS = 2_000
SOAK_CONNECTIONS = 200
SOAK_SHARE = 0.9
SOAK_PACE_SECONDS = 2.0
SOAK_MINUTES = 10


def overload(report: Report, server: Server, folder: Path) -> None:
    """Texts at fixed rates above what the service can do."""
    scene = text_scene(16, folder)
    scene.teach(server)
    requests = scene.forms()["raw"]
    rows = []
    with Load(server.url) as load:
        peak = Spread(tuple(load.run(Order(requests, 32, 3.0)).checked().rate for _ in range(ROUNDS)))
        calm = median(load.run(Order(requests, 1, 3.0)).checked().latencies)
        rows.append(["peak", "", peak.text(".0f"), "", "", ""])
        for times in OVERLOADS:
            order = Order(requests, OVERLOAD_CONNECTIONS, 10.0, rate=times * peak.median)
            result = load.run(order)
            goodput = result.rate
            refusals = 1e3 * float(np.quantile(result.refused or [0.0], 0.99))
            begun = time.perf_counter()
            while median(load.run(Order(requests, 1, 0.2)).checked().latencies) > 1.5 * calm:
                if time.perf_counter() - begun > 30:
                    break
            back = time.perf_counter() - begun
            rows.append(
                [f"{times} times", f"{order.rate:.0f}", f"{goodput:.0f}", str(len(result.refused)),
                 f"{refusals:.1f}", f"{1e3 * float(np.quantile(result.latencies, 0.5)):.0f}"]
            )  # fmt: skip
            report.data[f"overload {times}"] = {"statuses": dict(result.statuses), "late": result.late}
            limit = {2: 0.85, 5: 0.5}[times]
            report.expect(f"goodput at {times} times the peak", goodput / peak.median, ">=", limit)
            report.expect(f"p99 of refusals at {times} times the peak", refusals, "<=", 50.0, " ms")
            report.expect("refusals without Retry-After", len(result.refused) - result.advised, "<=", 0)
            report.expect(f"back to normal after {times} times the peak", back, "<=", 5.0, " s")
    head = [
        "",
        "requests a second",
        "answers a second",
        "refused",
        "p99 of refusals, ms",
        "p50 of answers, ms",
    ]
    report.add("More than the service can do", table(head, rows))


def soak(report: Report, server: Server, folder: Path) -> None:
    """Images and texts together at nine tenths of what the service can do, minute by minute."""
    if server.pid is None:
        raise SystemExit("The soak reads the memory of a service that it started itself; unset TOPWORK_URL.")
    rows, p99s, memory, paces = [], [], [], []
    refused = 0
    with ExitStack() as stack:
        scenes = (text_scene(16, folder), image_scene((224, 224), folder))
        # How fast the machine is meanwhile: its speed is not the same for ten minutes.
        bare = stack.enter_context(BareLoop(scenes[1].backbone, [one.input for one in scenes[1].asked]))
        passes = max(1, round(SOAK_PACE_SECONDS * bare.seek()[bare.best] / bare.count))
        loads = [stack.enter_context(Load(server.url)) for _ in scenes]

        def run(orders: Iterable[Order]) -> list[Round]:
            for load, order in zip(loads, orders, strict=True):
                load.begin(order)
            return [load.end() for load in loads]

        for scene in scenes:
            scene.teach(server)
        forms = [scene.forms()["raw"] for scene in scenes]
        # Both are measured under load at once: one alone would take all cores.
        rounds = [
            [found.checked() for found in run(Order(form, 16, 3.0) for form in forms)] for _ in range(ROUNDS)
        ]
        peaks = [median(results[place].rate for results in rounds) for place in range(len(scenes))]
        for minute in range(1, SOAK_MINUTES + 1):
            results = run(
                Order(form, SOAK_CONNECTIONS, 60.0, rate=SOAK_SHARE * peak)
                for form, peak in zip(forms, peaks, strict=True)
            )
            times = 1e3 * np.concatenate([result.latencies for result in results])
            late = sum(result.late for result in results)
            # A machine that has become slower than its peak was is asked for too much.
            refused += (refusals := sum(len(result.refused) for result in results))
            p99s.append(float(np.quantile(times, 0.99)))
            memory.append(resident(server.pid) / 1e6)
            paces.append(bare.count * passes / bare.seconds(bare.best, passes))
            rows.append(
                [str(minute), str(len(times)), str(refusals), str(late), f"{np.median(times):.2f}",
                 f"{p99s[-1]:.1f}", f"{times.max():.0f}", f"{memory[-1]:.1f}", f"{paces[-1]:.0f}"]
            )  # fmt: skip
    report.data["soak"] = {"p99_ms": p99s, "memory_mb": memory, "bare": paces, "refused": refused}
    report.expect(f"refused at {SOAK_SHARE:.0%} of the peak", refused, "<=", 0)
    report.expect("memory after the last minute over the first", memory[-1] / memory[0], "<=", 1.01)
    steady = median(p99s[-3:]) / median(p99s[1:4])
    report.expect("p99 of the last three minutes over the second to fourth", steady, "<=", 1.25)
    head = [
        "minute",
        "answers",
        "refused",
        "not sent",
        "p50, ms",
        "p99",
        "worst",
        "memory, MB",
        "bare loop, images/s",
    ]
    peak = " and ".join(f"{peak:.0f} {scene.name}" for peak, scene in zip(peaks, scenes, strict=True))
    found = table(head, rows)
    report.add(f"At {SOAK_SHARE:.0%} of the peak", f"{found}\n\nThe peak: {peak} a second, at once.")
