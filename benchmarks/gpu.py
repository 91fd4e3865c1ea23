"""Embedding on an NVIDIA GPU: bare sessions, the backbone as served, many callers, and the chip, in one run.

Needs the exported backbones (`python -m models.export`) and a GPU that ONNX Runtime can use; without one it
says so and fails, for figures from a CPU under this name would be a lie.
"""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.report import Report, Spread, table
from models.backbone import Backbone, planned
from models.batcher import Batcher
from models.exported import find
from models.network import load_network
from models.session import DeviceUnavailable, open_session
from models.spec import GRAPH_FILE, HALF_FILE, OUTPUT_NAME

ROUNDS = 5
SECONDS = 1.0
CALLERS = 64
PER_CALLER = 8


def device_name() -> str:
    """What nvidia-smi calls the first GPU, with its driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def photographs(count: int) -> list[bytes]:
    """JPEGs of 640×480 with the spectrum of photographs: smooth noise, seeded."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def sentences(count: int) -> list[str]:
    """Texts of about 16 and about 64 tokens, in turn."""
    words = (
        "refund",
        "order",
        "arrived",
        "nobody",
        "answers",
        "since",
        "the",
        "last",
        "update",
        "of",
        "your",
        "page",
    )
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(words, 14 if index % 2 else 60)) for index in range(count)]


def race(items: int, ways: Mapping[str, Callable[[], object]]) -> dict[str, Spread]:
    """Items a second of each way, in turn, over rounds of at least SECONDS each, after one run to warm up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(ROUNDS):
        for name, run in ways.items():
            begun = time.perf_counter()
            times = 0
            while time.perf_counter() - begun < SECONDS:
                run()
                times += 1
            found[name].append(items * times / (time.perf_counter() - begun))
    return {name: Spread(tuple(values)) for name, values in found.items()}


async def shared(backbone: Backbone, inputs: Sequence[bytes | str]) -> Spread:
    """Items a second through the batcher, decoding or tokenizing included, with CALLERS at once."""
    batcher = Batcher(backbone, max_queue=CALLERS * PER_CALLER * 2, workers=backbone.plan.workers)
    await batcher.start()
    try:
        parts = [[inputs[(caller + n) % len(inputs)] for n in range(PER_CALLER)] for caller in range(CALLERS)]
        found = []
        for _ in range(ROUNDS + 1):
            begun = time.perf_counter()
            await asyncio.gather(*(batcher.embed(part) for part in parts))
            found.append(CALLERS * PER_CALLER / (time.perf_counter() - begun))
        return Spread(tuple(found[1:]))
    finally:
        await batcher.close()


def chip(side: int = 8192, times: int = 20) -> float:
    """Floating point operations a second of a large product of matrices in float16, the fastest there is."""
    import torch

    one = torch.randn(side, side, device="cuda", dtype=torch.float16)
    torch.matmul(one, one)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        torch.matmul(one, one)
    torch.cuda.synchronize()
    return 2 * side**3 * times / (time.perf_counter() - begun)


def operations(name: str, feed: Mapping[str, Any]) -> float:
    """Floating point operations of the network for one input of the feed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = load_network(name)
    tensors = [torch.from_numpy(array) for array in feed.values()]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network.forward(*tensors)
    return float(counter.get_total_flops()) / len(tensors[0])


def measure(report: Report, name: str, folder: Path, inputs: Sequence[bytes | str], limit: float) -> None:
    """One backbone. limit: of the chip, in operations a second. Raises DeviceUnavailable."""
    threads = len(os.sched_getaffinity(0))
    plan = planned(folder, device="cuda", threads=threads).plan
    backbone = Backbone.open(folder, device="cuda", plan=plan)
    reference = Backbone.open(folder, device="cpu", threads=threads)
    prepared = [backbone.preprocess(each) for each in inputs]
    cpu, gpu = reference.run(prepared[:32]), backbone.run(prepared[:32])
    cosine = (cpu * gpu).sum(1) / (np.linalg.norm(cpu, axis=1) * np.linalg.norm(gpu, axis=1))
    report.expect(f"{name}: least cosine with the CPU", float(cosine.min()), ">=", 0.9999)
    rows = []
    best: dict[str, float] = {}
    kept: dict[str, Any] = {"plan": asdict(plan)}
    for count in (1, 8, 32, 128):
        some = prepared[:count]
        feed = backbone.feed(some)
        ways: dict[str, Callable[[], object]] = {"as served": partial(backbone.run, some)}
        for graph in (GRAPH_FILE, HALF_FILE):
            session = open_session(folder / graph, device="cuda")
            ways[f"bare session, {graph}"] = partial(session.run, [OUTPUT_NAME], feed)
        for way, spread in race(count, ways).items():
            rows.append([str(count), way, spread.text(".0f", "/s")])
            best[way] = max(best.get(way, 0.0), spread.median)
            kept[f"{way}, {count}"] = spread.values
    whole = asyncio.run(shared(backbone, inputs))
    rows.append(
        ["", f"batcher, {CALLERS} callers of {PER_CALLER}, preprocessing included", whole.text(".0f", "/s")]
    )
    kept["batcher"] = whole.values
    cost = operations(name, backbone.feed(prepared[:8]))
    kept["share of the chip"] = best["as served"] * cost / limit
    bare = max(rate for way, rate in best.items() if way != "as served")
    report.expect(
        f"{name}: best rate as served over the best bare session", best["as served"] / bare, ">=", 1.0
    )
    report.data[name] = kept
    about = (
        f"{plan}. {cost / 1e6:.0f} million operations an input: at the best rate "
        f"{kept['share of the chip']:.1%} of what the chip does in a product of matrices."
    )
    report.add(name, f"{table(['at once', 'way', 'rate'], rows)}\n\n{about}")


def main() -> int:
    """Runs both backbones; 1 where there is no GPU or no export, or a target is missed."""
    report = Report("gpu", "Embedding on a GPU")
    try:
        report.data["device"] = device_name()
        limit = chip()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"no GPU that nvidia-smi and torch can use: {error}", file=sys.stderr)
        return 1
    report.data["chip"] = limit
    report.add(
        "Device", f"{report.data['device']}: {limit / 1e12:.0f} trillion operations a second in float16."
    )
    for name, inputs in (("efficientnet-lite0", photographs(128)), ("minilm-l6-v2", sentences(128))):
        folder = find(name)
        if folder is None:
            print(f"{name} is not exported; run `python -m models.export`.", file=sys.stderr)
            return 1
        try:
            measure(report, name, folder, inputs, limit)
        except DeviceUnavailable as error:
            print(error, file=sys.stderr)
            return 1
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
