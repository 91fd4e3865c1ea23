"""Embedding on an NVIDIA GPU: bare sessions in every way, backbones as served, torch, and the chip's limits.

python -m benchmarks.gpu [--seconds S] [--results FOLDER] [--device cpu] [part ...]

Needs the exported backbones and a GPU that ONNX Runtime can use; without one it says so and fails, for
figures from a CPU under this name would be a lie. `--device cpu` is a rehearsal: it says so and writes no
results. Every figure is a line of JSON in FOLDER/gpu.jsonl as soon as it is known.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_session import Asked, Found
from benchmarks.operations import Cost, cost_of
from benchmarks.report import RESULTS, Report, Spread, table
from models import probes
from models.backbone import Backbone, planned
from models.batcher import Batcher
from models.exported import find
from models.gpu import lowest_cosine
from models.session import Device, DeviceUnavailable
from models.spec import GRAPH_FILE, HALF_FILE

PARTS = ("chip", "sessions", "served", "torch")
ROUNDS = 3
CALLERS = 64
PER_CALLER = 8
# Time limit of one bare session, in seconds.
_MOST_SECONDS = 60.0
_MIN_COSINE = 0.9999
# The backbone as served must reach this share of a bare session's rate with host copies.
_SERVED = 0.8
# Bytes of a copy, about those of 512 pictures.
_COPIED = 77_000_000
NAMES = {"efficientnet-lite0": (1, 8, 32, 128, 256), "minilm-l6-v2": (1, 32, 128, 512, 1024)}
# Tokens of texts.
_TOKENS = (16, 64)


@dataclass(frozen=True, slots=True)
class Way:
    """How a bare session runs."""

    half: bool
    channels_last: bool
    graphs: bool

    @property
    def name(self) -> str:
        """In words."""
        words = ["float16" if self.half else "float32"]
        words += ["channels last"] if self.channels_last else []
        words += ["graph"] if self.graphs else []
        return ", ".join(words)


class Bench:
    """What all parts need, and where their figures go."""

    def __init__(self, device: Device, seconds: float, results: Path, report: Report) -> None:
        self.device = device
        self.seconds = seconds
        self.report = report
        self.failed: list[str] = []
        self._file = None if device == "cpu" else (results / "gpu.jsonl").open("a", encoding="utf-8")

    def counts(self, name: str) -> Sequence[int]:
        """Inputs at once: few in a rehearsal, which is to end."""
        return NAMES[name] if self.device == "cuda" else NAMES[name][:2]

    def note(self, part: str, **figures: Any) -> None:
        """One figure, or some that belong together."""
        line = json.dumps({"part": part, **figures})
        print(line, flush=True)
        self.report.data.setdefault(part, []).append(figures)
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What fails in a part does not keep the others from being measured."""
        begun = time.perf_counter()
        try:
            yield
        except DeviceUnavailable:
            raise
        except Exception as error:
            self.failed.append(name)
            self.note(name, error=f"{type(error).__name__}: {error}")
        self.note(name, seconds=time.perf_counter() - begun)


def device_name() -> str:
    """What nvidia-smi calls the first GPU, with its driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def texts(count: int, tokens: int) -> list[str]:
    """Seeded sentences of about so many tokens, the two around each included."""
    words = ("refund", "order", "arrived", "nobody", "answers", "since", "the", "last", "update", "page")
    random = np.random.default_rng(0)
    return [" ".join(random.choice(words, tokens - 2)) for _ in range(count)]


def rate(run: Callable[[], object], items: int, seconds: float) -> Spread:
    """Items a second in ROUNDS rounds of at least so long, after a first run."""
    run()
    found = []
    for _ in range(ROUNDS):
        begun, runs = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            run()
            runs += 1
        found.append(items * runs / (time.perf_counter() - begun))
    return Spread(tuple(found))


def chip(bench: Bench) -> None:
    """What the GPU does at most: a product of matrices in float16, and copies there."""
    import torch

    side = 8192 if bench.device == "cuda" else 256
    one = torch.randn(side, side, device=bench.device, dtype=torch.float16)

    def multiply() -> None:
        torch.matmul(one, one)
        if bench.device == "cuda":
            torch.cuda.synchronize()

    product_rate = rate(multiply, 1, bench.seconds).median * 2 * side**3
    bench.note("chip", operations_a_second=product_rate)
    for pinned in (False, True) if bench.device == "cuda" else ():
        there = torch.empty(_COPIED, dtype=torch.uint8, device="cuda")
        here = torch.zeros(_COPIED, dtype=torch.uint8, pin_memory=pinned)

        def copy(there: Any = there, here: Any = here) -> None:
            there.copy_(here)
            torch.cuda.synchronize()

        bench.note("chip", pinned=pinned, bytes_a_second=rate(copy, _COPIED, bench.seconds).median)


def _inputs(backbone: Backbone) -> Iterator[tuple[str, list[bytes | str]]]:
    if backbone.spec.kind == "image":
        yield "224 px", list(probes.pictures())
    else:
        for tokens in _TOKENS:
            yield f"{tokens} tokens", list(texts(64, tokens))


def _ways(backbone: Backbone, device: Device) -> Iterator[Way]:
    layouts = (False, True) if backbone.spec.kind == "image" and device == "cuda" else (False,)
    graphs = (False, True) if device == "cuda" else (False,)
    for half, last, captured in product((True, False), layouts, graphs):
        if half or not last:
            yield Way(half, last, captured)


def sessions(bench: Bench, name: str, folder: Path) -> None:
    """Bare sessions in every way: float16 or float32, layouts, CUDA graphs, batches."""
    reference = Backbone.open(folder)
    rows = []
    with tempfile.TemporaryDirectory(prefix="topwork-gpu-") as scratch:
        for what, inputs in _inputs(reference):
            prepared = [reference.preprocess(one) for one in inputs]
            embeddings = reference.run(prepared)
            cost = cost_of(folder / GRAPH_FILE, reference.feed(prepared[:1]))
            for count in bench.counts(name):
                order = [place % len(prepared) for place in range(count)]
                feed: dict[str, Any] = reference.feed([prepared[place] for place in order])
                np.savez(Path(scratch, "feed.npz"), **feed)
                np.save(Path(scratch, "reference.npy"), embeddings[order])
                for way in _ways(reference, bench.device):
                    asked = Asked(
                        str(folder / (HALF_FILE if way.half else GRAPH_FILE)),
                        str(Path(scratch, "feed.npz")),
                        str(Path(scratch, "reference.npy")),
                        bench.device,
                        way.half,
                        way.channels_last,
                        way.graphs,
                        bench.seconds,
                    )
                    found = _run(asked)
                    about = {"backbone": name, "inputs": what, "count": count, "way": way.name}
                    if isinstance(found, str):
                        bench.note("sessions", **about, error=found)
                        continue
                    bench.note("sessions", **about, **asdict(found), **_limits(bench, cost, count, way))
                    on_device, copied = Spread(tuple(found.on_device)), Spread(tuple(found.with_copies))
                    rows.append(
                        [
                            what,
                            str(count),
                            way.name,
                            on_device.text(".0f"),
                            copied.text(".0f"),
                            f"{1e3 * found.first:.0f} ms",
                            f"{found.cosine:.6f}",
                        ]
                    )
    head = ["inputs", "at once", "way", "on the device, /s", "with copies, /s", "first run", "cosine"]
    bench.report.add(f"Bare sessions of {name}", table(head, rows))


def _run(asked: Asked) -> Found | str:
    """What was found, or why nothing was."""
    command = [sys.executable, "-m", "benchmarks.gpu_session"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(asked)),
            capture_output=True,
            text=True,
            timeout=_MOST_SECONDS,
            check=False,
        )
        return Found(**json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        return f"it took more than {_MOST_SECONDS:g} s"
    except ValueError:
        return (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]


def _limits(bench: Bench, cost: Cost, count: int, way: Way) -> Mapping[str, float]:
    """Inputs a second at most: by operations, where the chip's are known, and what must be moved of each."""
    width = 2 if way.half else 4
    limits = {"bytes_an_input": width * (cost.weights / count + cost.activations)}
    for one in bench.report.data.get("chip", ()):
        if "operations_a_second" in one:
            limits["limit_by_operations"] = one["operations_a_second"] / cost.operations
    return limits


def served(bench: Bench, name: str, folder: Path) -> None:
    """The backbone as it is served, by the plan that is measured for it: its runs, and with callers."""
    import os

    threads = len(os.sched_getaffinity(0))
    begun = time.perf_counter()
    measured = planned(folder, device=bench.device, threads=threads)
    bench.note("served", backbone=name, planning=time.perf_counter() - begun, **asdict(measured))
    begun = time.perf_counter()
    backbone = Backbone.open(folder, device=bench.device, plan=measured.plan)
    bench.note("served", backbone=name, opening=time.perf_counter() - begun)
    reference = Backbone.open(folder)
    rows = []
    for what, inputs in _inputs(backbone):
        prepared = [backbone.preprocess(one) for one in inputs]
        cosine = lowest_cosine(backbone.run(prepared), reference.run(prepared))
        bench.report.expect(f"{name}, {what}: least cosine with the CPU", cosine, ">=", _MIN_COSINE)
        for count in bench.counts(name):
            some = [prepared[place % len(prepared)] for place in range(count)]
            spread = rate(lambda some=some: backbone.run(some), count, bench.seconds)  # type: ignore[misc]
            bench.note("served", backbone=name, inputs=what, count=count, rates=spread.values)
            rows.append([what, f"{count} prepared", spread.text(".0f", "/s")])
            bare = _bare(bench, name, what, count)
            if bare is not None:
                goal = f"{name}, {what}, {count} at once: as served over the bare float16 session with copies"
                bench.report.expect(goal, spread.median / bare, ">=", _SERVED)
        whole = asyncio.run(_shared(backbone, inputs, bench.seconds))
        bench.note("served", backbone=name, inputs=what, callers=CALLERS, rates=whole.values)
        rows.append([what, f"{CALLERS} callers of {PER_CALLER}, preparing included", whole.text(".0f", "/s")])
    backbone.close()
    bench.report.add(f"{name} as served", f"{measured.plan}\n\n{table(['inputs', 'at once', 'rate'], rows)}")


def _bare(bench: Bench, name: str, what: str, count: int) -> float | None:
    """The best bare session in float16 with copies, without a graph, if it was measured."""
    rates = [
        max(one["with_copies"])
        for one in bench.report.data.get("sessions", ())
        if (one.get("backbone"), one.get("inputs"), one.get("count")) == (name, what, count)
        and "with_copies" in one
        and one["way"].startswith("float16")
        and "graph" not in one["way"]
    ]
    return max(rates, default=None)


async def _shared(backbone: Backbone, inputs: Sequence[bytes | str], seconds: float) -> Spread:
    """Items a second through the batcher, with callers that ask again at once."""
    batcher = Batcher(backbone, max_queue=CALLERS * PER_CALLER * 2, workers=backbone.plan.workers)
    await batcher.start()
    done, ended = 0, False

    async def call(caller: int) -> None:
        nonlocal done
        some = [inputs[(caller + place) % len(inputs)] for place in range(PER_CALLER)]
        while not ended:
            await batcher.embed(some, source=caller)
            done += PER_CALLER

    callers = [asyncio.create_task(call(caller)) for caller in range(CALLERS)]
    found = []
    # The first of them to warm up.
    for _ in range(ROUNDS + 1):
        before, begun = done, time.perf_counter()
        await asyncio.sleep(3 * seconds)
        found.append((done - before) / (time.perf_counter() - begun))
    ended = True
    await asyncio.gather(*callers)
    await batcher.close()
    return Spread(tuple(found[1:]))


def in_torch(bench: Bench) -> None:
    """timm's network of the same form, with random weights, as fast as torch runs it: float16 and a graph."""
    import timm
    import torch

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
    network = network.to(bench.device, memory_format=torch.channels_last)
    if bench.device == "cuda":
        network = network.half()
    rows = []
    for count in bench.counts("efficientnet-lite0"):
        dtype = torch.float16 if bench.device == "cuda" else torch.float32
        pixels = torch.randn(count, 3, 224, 224, device=bench.device, dtype=dtype)
        pixels = pixels.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            run = _captured(network, pixels) if bench.device == "cuda" else lambda: network(pixels)  # noqa: B023
            spread = rate(run, count, bench.seconds)
        bench.note("torch", network="tf_efficientnet_lite0", count=count, rates=spread.values)
        rows.append([str(count), spread.text(".0f", "/s")])
    bench.report.add("timm in torch", table(["at once", "rate"], rows))


def _captured(network: Any, pixels: Any) -> Callable[[], object]:
    import torch

    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        for _ in range(3):
            network(pixels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(pixels)

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; 1 where there is no GPU or no export, a part fails or a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=0.5, help="of each round")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    report = Report("gpu", "Embedding on a GPU")
    folders = {name: find(name) for name in NAMES}
    if missing := [name for name, folder in folders.items() if folder is None]:
        print(f"{', '.join(missing)}: not exported; run `python -m models.export`.", file=sys.stderr)
        return 1
    if options.device == "cuda":
        try:
            report.data["device"] = device_name()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no GPU that nvidia-smi can find: {error}", file=sys.stderr)
            return 1
        report.add("Device", report.data["device"])
    bench = Bench(options.device, options.seconds, options.results, report)
    parts = options.parts or PARTS
    try:
        for name, work in (("chip", chip), ("torch", in_torch)):
            if name in parts:
                with bench.part(name):
                    work(bench)
        for part, each in (("sessions", sessions), ("served", served)):
            for name, folder in folders.items():
                if part in parts and folder is not None:
                    with bench.part(part):
                        each(bench, name, folder)
    except DeviceUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    if options.device == "cpu":
        print(f"A rehearsal on the CPU, of which nothing is kept; failed: {bench.failed or 'nothing'}.")
        return int(bool(bench.failed))
    return report.finish() or int(bool(bench.failed))


if __name__ == "__main__":
    raise SystemExit(main())
