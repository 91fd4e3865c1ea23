"""How long an adapt takes beside a bare loop, one more example beside thousands, and predicts beside adapts.

python -m benchmarks.training.adapt [part ...]        # bare, append, latency; all by default
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import numpy as np

from benchmarks.data import datasets
from benchmarks.data.datasets import Sample
from benchmarks.data.pictures import photographs
from benchmarks.harness import bare_loop, client
from benchmarks.harness.caller import Line, Repeater, Request, Timer, json_request
from benchmarks.harness.contenders import BareLoop
from benchmarks.harness.options import asked
from benchmarks.harness.report import Report, Spread, table

IMAGES = 200
ROUNDS = 7
BARE_RATIO = 1.25
KEPT = 2_000
APPEND_SECONDS = {"image": 1.5, "text": 0.6}
WINDOW_REQUESTS = 1_000
LATENCY_RATIO = 1.5


def multipart_adapt(adapter: str, samples: Sequence[Sample], tenant: str) -> Request:
    """An /adapt of images as a form of files, each named label/number.jpg."""
    files = [
        ("examples", (f"{sample.label}/{index}.jpg", sample.input)) for index, sample in enumerate(samples)
    ]
    encoded = httpx.Request(
        "POST", "http://service/adapt", data={"adapter": adapter, "strict": "true"}, files=files
    )
    return Request(
        "POST",
        "/adapt",
        encoded.read(),
        {"Content-Type": encoded.headers["Content-Type"], "X-Tenant": tenant},
    )


def json_adapt(adapter: str, samples: Sequence[Sample], tenant: str) -> Request:
    """An /adapt as JSON."""
    examples = [client.as_example(sample) for sample in samples]
    return json_request("/adapt", {"adapter": adapter, "strict": True, "examples": examples}, tenant)


def delete(adapter: str, tenant: str) -> Request:
    """Removes an adapter, so that its examples are new again."""
    return Request("DELETE", f"/adapters/{adapter}", headers={"X-Tenant": tenant})


def beside_bare_loop(report: Report, server: client.Server, folder: Path) -> None:
    """/adapt of images that the service has not seen, in turn with the bare loops on the same images."""
    images = photographs(IMAGES, folder=folder)
    tenant = "bench-bare"
    bodies = {
        "multipart": multipart_adapt("bare", images, tenant),
        "JSON": json_adapt("bare", images, tenant),
    }
    seconds: dict[str, list[float]] = {name: [] for name in [*bare_loop.WAYS, *bodies]}
    stages: list[dict[str, float]] = []
    with BareLoop("efficientnet-lite0", [sample.input for sample in images]) as loops:
        for round_number in range(ROUNDS + 1):
            for name in bare_loop.WAYS:
                seconds[name].append(loops.seconds(name))
            line = Line(server.url)  # a new one each round: the service closes connections idle for long
            for name, body in bodies.items():
                begin = time.perf_counter()
                answer = json.loads(line.ask(body))
                seconds[name].append(time.perf_counter() - begin)
                stages.append(answer["timing_ms"])
                line.ask(delete("bare", tenant))
            if round_number == 0:  # a warm-up of both sides
                for times in seconds.values():
                    times.clear()
                stages.clear()
    spreads = {name: Spread(tuple(times)) for name, times in seconds.items()}
    best = min(bare_loop.WAYS, key=lambda name: spreads[name].median)
    rows = [
        [f"bare: {name}" if name in bare_loop.WAYS else f"/adapt, {name}", spread.text(".3f", " s"),
         f"{spread.median / spreads[best].median:.2f}"]
        for name, spread in spreads.items()
    ]  # fmt: skip
    report.add(
        f"/adapt with {IMAGES} JPEGs of 640x480 beside bare loops",
        table(["", "seconds", "of the best loop"], rows),
    )
    parts = {name: median(stage[name] for stage in stages) for name in stages[0]}
    report.add(
        "Stages of those adapts, median ms",
        table(list(parts), [[f"{value:.0f}" for value in parts.values()]]),
    )
    report.data["bare"] = {name: list(spread.values) for name, spread in spreads.items()} | {"stages": parts}
    for name in bodies:
        ratio = spreads[name].median / spreads[best].median
        report.expect(f"/adapt of {IMAGES} images ({name}) over the best bare loop", ratio, "<=", BARE_RATIO)


def one_more(report: Report, server: client.Server, folder: Path) -> None:
    """One example added to thousands, which fits everything again."""
    rows = []
    for kind, name in (("image", "fashion-mnist"), ("text", "trec-coarse")):
        samples = datasets.stratified_order(datasets.load(name, folder).samples, 0)[: KEPT + ROUNDS]
        tenant = f"bench-append-{kind}"
        service = client.Client(server, tenant)
        service.adapt("append", samples[:KEPT])
        dim = {backbone["kind"]: backbone["dim"] for backbone in service.backbones()}[kind]
        line = Line(server.url)
        seconds = Spread(
            tuple(line.seconds(json_adapt("append", [sample], tenant)) for sample in samples[KEPT:])
        )
        line.ask(delete("append", tenant))
        service.close()
        rows.append([name, str(dim), seconds.text(".3f", " s")])
        report.data[f"append {kind}"] = list(seconds.values)
        report.expect(
            f"one example more than {KEPT} at {dim} dimensions",
            seconds.median,
            "<=",
            APPEND_SECONDS[kind],
            " s",
        )
    report.add(f"One example more than {KEPT}", table(["set", "dimensions", "seconds"], rows))


@dataclass(frozen=True, slots=True)
class _Scene:
    """One tenant's requests while another adapts."""

    name: str
    predicts: list[Request]
    adapts: list[Request]


def _scenes(server: client.Server, folder: Path) -> Iterator[_Scene]:
    images = photographs(100 + IMAGES, folder=folder)
    texts = datasets.stratified_order(datasets.load("trec-coarse", folder).samples, 1)
    for name, samples, kind in (
        ("image", images, "image/jpeg"),
        ("text", texts, "text/plain; charset=utf-8"),
    ):
        service = client.Client(server, "bench-asking")
        service.adapt(f"asked-{name}", samples[:100])
        service.close()
        predicts = [
            Request("POST", f"/predict?adapter=asked-{name}", sample.input if isinstance(sample.input, bytes)
                    else sample.input.encode(), {"Content-Type": kind, "X-Tenant": "bench-asking"})
            for sample in samples[:50]
        ]  # fmt: skip
        other = "bench-adapting"
        bulk = samples[100 : 100 + (IMAGES if name == "image" else 1_000)]
        build = multipart_adapt if name == "image" else json_adapt
        yield _Scene(name, predicts, [build("other", bulk, other), delete("other", other)])


def beside_adapts(report: Report, server: client.Server, folder: Path) -> None:
    """Predictions one after the other, in windows alone and windows while another tenant adapts in a loop."""
    rows = []
    with Timer(server.url) as timer, Repeater(server.url) as repeater:
        own = timer.times([Request("GET", "/livez")], 500)
        for scene in _scenes(server, folder):
            alone: list[list[float]] = []
            beside: list[list[float]] = []
            adapts = 0
            timer.times(scene.predicts, 200)
            for _ in range(ROUNDS):
                alone.append(timer.times(scene.predicts, WINDOW_REQUESTS))
                repeater.start(scene.adapts)
                time.sleep(0.2)
                beside.append(timer.times(scene.predicts, WINDOW_REQUESTS))
                adapts += repeater.stop()
            quantiles = {}
            for name, windows in (("alone", alone), ("while another adapts", beside)):
                p99 = Spread(tuple(1e3 * float(np.quantile(window, 0.99)) for window in windows))
                p50 = Spread(tuple(1e3 * float(np.quantile(window, 0.5)) for window in windows))
                worst = 1e3 * max(max(window) for window in windows)
                quantiles[name] = p99
                rows.append(
                    [scene.name, name, p50.text(".2f", " ms"), p99.text(".2f", " ms"), f"{worst:.1f} ms"]
                )
                report.data[f"latency {scene.name} {name}"] = {"p50_ms": p50.values, "p99_ms": p99.values}
            ratio = quantiles["while another adapts"].median / quantiles["alone"].median
            rows[-1][1] += f" ({adapts} adapts)"
            report.expect(
                f"p99 of /predict ({scene.name}) while another adapts, over alone", ratio, "<=", LATENCY_RATIO
            )
    head = ["input", "", "p50 of a window", "p99 of a window", "worst"]
    note = f"Windows of {WINDOW_REQUESTS} requests in turn. A GET of /livez: {1e3 * median(own):.2f} ms."
    report.add("/predict, one input at a time", f"{table(head, rows)}\n\n{note}")


PARTS = {"bare": beside_bare_loop, "append": one_more, "latency": beside_adapts}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the named parts and writes benchmarks/results/adapt.md and .json; 1 if a target is missed."""
    options = asked(__doc__, PARTS, arguments)
    report = Report("adapt", "Adapting")
    with client.running() as server:
        for name in options.parts:
            PARTS[name](report, server, options.data)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
