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
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import machine
from benchmarks.gpu.bench import NAMES, Bench
from benchmarks.gpu.operations import Cost, cost_of
from benchmarks.gpu.session import Asked, Found
from benchmarks.harness.report import RESULTS, Report, Spread, table
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.feeds import probe_images
from models.runtime.cuda import lowest_cosine
from models.runtime.session import Device, DeviceUnavailable
from models.spec import GRAPH_FILE, HALF_FILE
from models.store.exports import find
from models.survey import planned

PARTS = ("chip", "sessions", "served", "torch")
ROUNDS = 3
CALLERS = 64
PER_CALLER = 8
# Time limit of one batch of a bare session, in seconds.
_MOST_SECONDS = 15.0
_MIN_COSINE = 0.9999
# The backbone as served must reach this share of a bare session's rate with host copies.
_SERVED = 0.8
# Bytes of a copy, about those of 512 pictures.
_COPIED = 77_000_000
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


def device_name() -> str:
    """The name of the first GPU and its driver, from nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def texts(count: int, tokens: int) -> list[str]:
    """Seeded sentences of about this number of tokens, including the two special ones."""
    words = ("refund", "order", "arrived", "nobody", "answers", "since", "the", "last", "update", "page")
    random = np.random.default_rng(0)
    return [" ".join(random.choice(words, tokens - 2)) for _ in range(count)]


def rate(run: Callable[[], object], items: int, seconds: float) -> Spread:
    """Items a second in ROUNDS rounds of at least this duration, after a first run."""
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
    """The GPU's peak rates."""
    _note_all(bench, "chip", machine.chip)


def in_torch(bench: Bench) -> None:
    """The network of the images as torch runs it."""
    _note_all(bench, "torch", machine.network)


def _note_all(bench: Bench, part: str, measured: Callable[[], Iterator[dict[str, Any]]]) -> None:
    try:
        for figures in measured():
            bench.note(part, **figures)
    except machine.NoCuda:
        bench.note(part, skipped="torch finds no GPU")


def _inputs(backbone: Backbone) -> Iterator[tuple[str, list[bytes | str]]]:
    if backbone.spec.kind == "image":
        yield "224 px", list(probe_images())
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
    batches: list[Batch] = []
    with tempfile.TemporaryDirectory(prefix="topwork-gpu-") as scratch:
        for what, inputs in _inputs(reference):
            prepared = [reference.preprocess(one) for one in inputs]
            embeddings = reference.run(prepared)
            cost = cost_of(folder / GRAPH_FILE, reference.feed(prepared[:1]))
            for count in bench.counts(name):
                order = [place % len(prepared) for place in range(count)]
                feed: dict[str, Any] = reference.feed([prepared[place] for place in order])
                batch = Batch(what, count, cost, Path(scratch, f"{len(batches)}"))
                np.savez(batch.feed, **feed)
                np.save(batch.reference, embeddings[order])
                batches.append(batch)
        for way in _ways(reference, bench.device):
            asked = Asked(
                str(folder / (HALF_FILE if way.half else GRAPH_FILE)),
                [(str(batch.feed), str(batch.reference)) for batch in batches],
                bench.device,
                way.half,
                way.channels_last,
                way.graphs,
                bench.seconds,
            )
            every, error = run_session(asked)
            for batch, found in zip(batches, every, strict=False):
                about = {"backbone": name, "inputs": batch.what, "count": batch.count, "way": way.name}
                limits = _limits(bench, batch.cost, batch.count, way)
                bench.note("sessions", **about, **asdict(found), **limits)
            if error is not None:
                bench.note("sessions", backbone=name, way=way.name, error=error)


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one kind, in two files whose names begin with `path`; `cost` is that of one input."""

    what: str
    count: int
    cost: Cost
    path: Path

    @property
    def feed(self) -> Path:
        """The graph's inputs."""
        return self.path.with_suffix(".npz")

    @property
    def reference(self) -> Path:
        """The embeddings of a CPU."""
        return self.path.with_suffix(".npy")


def add_tables(report: Report) -> None:
    """Figures of bare sessions and of torch, from this run or an earlier one."""
    for name in NAMES:
        rows = [
            [
                one["inputs"],
                str(one["count"]),
                one["way"],
                Spread(tuple(one["on_device"])).text(".0f"),
                Spread(tuple(one["with_copies"])).text(".0f"),
                _share(one),
                f"{1e3 * one['first']:.0f} ms",
                f"{one['cosine']:.6f}",
            ]
            for one in report.data.get("sessions", ())
            if one.get("backbone") == name and "on_device" in one
        ]
        head = [
            "inputs",
            "at once",
            "way",
            "on the device, /s",
            "with copies, /s",
            "of the limit",
            "first run",
            "cosine",
        ]
        if rows:
            report.add(f"Bare sessions of {name}", table(head, sorted(rows, key=lambda row: row[0])))
    rows = [
        [str(one["count"]), f"{one['images_a_second']:.0f}"]
        for one in report.data.get("torch", ())
        if "count" in one
    ]
    if rows:
        report.add("timm in torch", table(["at once", "images a second"], rows))


def _share(one: Mapping[str, Any]) -> str:
    """The share of the chip's peak, by operations or by bytes moved."""
    limits = [one[name] for name in ("limit_by_operations", "limit_by_bytes") if name in one]
    return f"{100 * max(one['on_device']) / min(limits):.0f} %" if limits else ""


def run_session(asked: Asked) -> tuple[list[Found], str | None]:
    """Findings of each batch in turn, and the reason where they end early."""
    command = [sys.executable, "-m", "benchmarks.gpu.session"]
    limit = _MOST_SECONDS * len(asked.batches)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(json.dumps(asdict(asked)), timeout=limit)
            why = None
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            why = f"it took more than {limit:g} s"
    found = [Found(**json.loads(line)) for line in output.splitlines()]
    if why is None and len(found) < len(asked.batches):
        why = (errors.strip().splitlines() or [f"it ended with {process.returncode}"])[-1]
    return found, why


def _limits(bench: Bench, cost: Cost, count: int, way: Way) -> Mapping[str, float]:
    """Inputs a second at most, by operations and by bytes, where the chip's own rates are known."""
    width = 2 if way.half else 4
    moved = width * (cost.weights / count + cost.activations)
    limits = {"bytes_an_input": moved}
    for one in bench.report.data.get("chip", ()):
        if "operations_a_second" in one:
            limits["limit_by_operations"] = one["operations_a_second"] / cost.operations
        if "bytes_a_second_on_the_device" in one:
            limits["limit_by_bytes"] = one["bytes_a_second_on_the_device"] / moved
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
    add_tables(report)
    if options.device == "cpu":
        print(f"A rehearsal on the CPU, of which nothing is kept; failed: {bench.failed or 'nothing'}.")
        return int(bool(bench.failed))
    return report.finish(options.results) or int(bool(bench.failed))


if __name__ == "__main__":
    raise SystemExit(main())
