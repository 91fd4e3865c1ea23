"""What the shipped HAProxy adds to a request: the same predictions, directly and through it.

python -m benchmarks.scale.proxy_overhead
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness import client
from benchmarks.harness.load import Load, Order
from benchmarks.harness.options import asked
from benchmarks.harness.payloads import text_scene
from benchmarks.harness.report import Report, Spread, table
from deploy.cluster.proxy import HAProxy

TOKENS = 16
CONNECTIONS = (1, 8, 32)
ROUNDS = 9
SECONDS = 3.0
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU that the process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def main(arguments: Sequence[str] | None = None) -> int:
    """Write benchmarks/results/proxy_overhead.md and .json."""
    options = asked(__doc__, (), arguments)
    report = Report("proxy_overhead", "What HAProxy adds to a request")
    scene = text_scene(TOKENS, options.data)
    rows = []
    with ExitStack() as parts:
        home = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="topwork-bench-")))
        server = parts.enter_context(client.running({"TOPWORK_BACKBONES": scene.backbone}))
        scene.teach(server)
        requests = scene.forms()["raw"]
        proxy = parts.enter_context(HAProxy([server.url], home))
        direct, through = (parts.enter_context(Load(url)) for url in (server.url, proxy.url))
        for connections in CONNECTIONS:
            order = Order(requests, connections, SECONDS)
            added, ratios, cpu = [], [], []
            for number in range(ROUNDS + 1):
                without = direct.run(order).checked()
                before = cpu_seconds(proxy.process.pid)
                found = through.run(order).checked()
                if number:
                    cpu.append(1e6 * (cpu_seconds(proxy.process.pid) - before) / len(found.latencies))
                    added.append(
                        1e3 * (statistics.median(found.latencies) - statistics.median(without.latencies))
                    )
                    ratios.append(found.rate / without.rate)
            report.data[str(connections)] = {"added_ms": added, "rate_ratio": ratios, "cpu_us": cpu}
            rows.append(
                [
                    str(connections),
                    Spread(tuple(added)).text(unit=" ms"),
                    Spread(tuple(ratios)).text(".3f"),
                    Spread(tuple(cpu)).text(".0f", " µs"),
                ]
            )
    head = [
        "connections",
        "added to the median",
        "requests a second, over direct",
        "CPU of HAProxy a request",
    ]
    report.add(f"One text of {TOKENS} tokens a request", table(head, rows))
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
