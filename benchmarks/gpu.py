"""Embedding on an NVIDIA GPU: the bare session, the backbone, and the batcher under many callers, in one run.

Needs the exported backbones (`python -m models.export`) and a GPU that ONNX Runtime can use; without one it
says so and fails, for figures from a CPU under this name would be a lie.
"""

from __future__ import annotations

import asyncio
import functools
import io
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.report import Report, Spread, table
from models.backbone import Backbone
from models.batcher import Batcher
from models.exported import find
from models.session import DeviceUnavailable, open_session
from models.spec import GRAPH_FILE, OUTPUT_NAME

BATCHES = (1, 8, 32, 128)
ROUNDS = 5
SECONDS = 1.0
CALLERS = 64
PER_CALLER = 8
DECODERS = 16


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


def rates(items: int, run: Callable[[], Any]) -> Spread:
    """Items a second over rounds of at least SECONDS each, after one run to warm up."""
    run()
    found = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        times = 0
        while time.perf_counter() - begun < SECONDS:
            run()
            times += 1
        found.append(items * times / (time.perf_counter() - begun))
    return Spread(tuple(found))


async def shared(backbone: Backbone, inputs: Sequence[bytes | str]) -> Spread:
    """Items a second through the batcher, decoding or tokenizing included, with CALLERS at once."""
    batcher = Batcher(backbone, max_queue=CALLERS * PER_CALLER * 2, workers=DECODERS)
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


def main() -> int:
    """Runs both backbones; 1 where there is no GPU or no export."""
    report = Report("gpu", "Embedding on a GPU")
    rows = []
    for name, inputs in (("efficientnet-lite0", photographs(128)), ("minilm-l6-v2", sentences(128))):
        folder = find(name)
        if folder is None:
            print(f"{name} is not exported; run `python -m models.export`.", file=sys.stderr)
            return 1
        try:
            backbone = Backbone.open(folder, device="cuda")
        except DeviceUnavailable as error:
            print(error, file=sys.stderr)
            return 1
        reference = Backbone.open(folder, device="cpu", threads=4)
        prepared = [backbone.preprocess(each) for each in inputs]
        cpu, gpu = reference.run(prepared[:32]), backbone.run(prepared[:32])
        cosine = (cpu * gpu).sum(1) / (np.linalg.norm(cpu, axis=1) * np.linalg.norm(gpu, axis=1))
        report.expect(f"{name}: least cosine with the CPU", float(cosine.min()), ">=", 0.9999)
        session = open_session(folder / GRAPH_FILE, device="cuda", threads=1)
        bare = {}
        for batch in BATCHES:
            fed = backbone.feed(prepared[:batch])
            bare[batch] = rates(batch, functools.partial(session.run, [OUTPUT_NAME], fed))
            rows.append([name, f"bare session, batch {batch}", bare[batch].text(".0f", "/s")])
        run = rates(len(prepared), functools.partial(backbone.run, prepared))
        rows.append([name, f"Backbone.run, {len(prepared)}", run.text(".0f", "/s")])
        whole = asyncio.run(shared(backbone, inputs))
        rows.append(
            [
                name,
                f"Batcher, {CALLERS} callers of {PER_CALLER}, preprocessing included",
                whole.text(".0f", "/s"),
            ]
        )
        best = max(spread.median for spread in bare.values())
        report.data[name] = {
            "bare": {str(b): s.values for b, s in bare.items()},
            "run": run.values,
            "batcher": whole.values,
        }
        report.data[name]["run over best bare"] = run.median / best
    device = device_name()
    report.data["device"] = device
    report.add(f"Inputs a second on {device}", table(["backbone", "way", "rate"], rows))
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
