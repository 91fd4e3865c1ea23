"""What Ray costs when two actors embed an upload of 20,000 texts, beside two bare processes.

python -m benchmarks.scale.ray_overhead

The bare processes have the texts and a loaded backbone, and embed a half each, 250 at a time. With Ray, a
job's attempt reads the upload from its store, two actors embed it, and the attempt takes it back by the
thousand, as it does to store them. "Warm" begins with the first texts that come back.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from adapters.adaptation.input_embedder import BatchEmbedder
from adapters.examples.target import input_digest
from adapters.jobs.config import WorkerConfig
from adapters.registry.jobs import upload_request
from adapters.registry.records import AdapterRecord, JobRecord
from adapters.storage.local import LocalStore
from benchmarks.data import datasets
from benchmarks.data.archives import DEFAULT_FOLDER
from benchmarks.harness.options import asked
from benchmarks.harness.report import Report, Spread, table
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.store.exports import find
from service.settings import Settings

TEXTS = 20_000
WORDS = 12  # of a text
PART = 1_000
BATCH = 250
ROUNDS = 3
BACKBONE = "minilm-l6-v2"
MOST = 1.15


def texts(folder: Path) -> list[str]:
    """Different runs of WORDS words, out of 20 Newsgroups."""
    found: dict[str, None] = {}
    for sample in datasets.load("20-newsgroups", folder).part("train"):
        assert isinstance(sample.input, str)
        words = sample.input.split()
        for begin in range(0, min(len(words), 10 * WORDS) - WORDS, WORDS):
            found[" ".join(words[begin : begin + WORDS])] = None
        if len(found) >= TEXTS:
            return list(found)[:TEXTS]
    raise ValueError(f"there are only {len(found)} texts")


def opened() -> Backbone:
    """The backbone, for one thread."""
    export = find(BACKBONE)
    if export is None:
        raise SystemExit(f"{BACKBONE} is not exported; run `python -m models.export`")
    return Backbone.open(export)


def bare() -> None:
    """Embed what standard input says, when it says so; the other end of a pipe takes the time."""
    backbone, inputs = opened(), json.loads(sys.stdin.readline())
    print("ready", flush=True)
    for _ in sys.stdin:
        for begin in range(0, len(inputs), BATCH):
            backbone.embed(inputs[begin : begin + BATCH])
        print("done", flush=True)


class Bare:
    """Two processes, each with a half of the texts."""

    def __init__(self, inputs: Sequence[str], stack: ExitStack) -> None:
        self._processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", "from benchmarks.scale.ray_overhead import bare; bare()"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(2)
        ]
        for place, process in enumerate(self._processes):
            self._say(process, json.dumps(inputs[place::2]))
        self._hear()

    def seconds(self) -> float:
        """Embed all of them once."""
        begun = time.perf_counter()
        for process in self._processes:
            self._say(process, "go")
        self._hear()
        return time.perf_counter() - begun

    def close(self) -> None:
        """End both."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()

    @staticmethod
    def _say(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{line}\n")
        process.stdin.flush()

    def _hear(self) -> None:
        for process in self._processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("a bare process has ended")


def stored_upload(inputs: Sequence[str], folder: Path, backbone: Backbone) -> tuple[AdapterRecord, JobRecord]:
    """An upload of the texts in a store, with the records that a worker would read."""
    now = datetime.now(UTC)
    adapter = AdapterRecord(
        secrets.token_hex(16), "bench", "texts", BACKBONE, backbone.fingerprint, "text", "classification",
        True, 0, None, 0, 0, now,
    )  # fmt: skip
    content = "\n".join(json.dumps({"text": text, "label": "a"}) for text in inputs).encode()
    part = LocalStore(folder).publish(adapter.tenant, adapter.uid, content)
    request = {"form": "ndjson", "upload": upload_request([part])}
    job = JobRecord(
        secrets.token_hex(16), adapter.tenant, adapter.uid, adapter.name, "bulk_adapt", "running", request,
        None, 1, None, False, None, None, None, None, now, now, None,
    )  # fmt: skip
    return adapter, job


async def taken(embedder: BatchEmbedder, inputs: Sequence[str]) -> list[float]:
    """The times at which each thousand had come back."""
    times = []
    for begin in range(0, len(inputs), PART):
        await embedder.embed(inputs[begin : begin + PART], bulk=True)
        times.append(time.perf_counter())
    return times


async def with_ray(config: WorkerConfig, inputs: Sequence[str], folder: Path) -> tuple[float, float]:
    """Seconds for all texts, from the start of the actors on, and as many of warm ones would take."""
    from adapters.workers.ray_embedder import RayEmbedder

    backbone = opened()
    batcher = Batcher(backbone, max_queue=PART, workers=1)
    await batcher.start()
    adapter, job = stored_upload(inputs, folder, backbone)
    embedder = RayEmbedder(config, batcher, adapter, job)
    try:
        begun = time.perf_counter()
        await embedder.begin({input_digest(text) for text in inputs})
        times = await taken(embedder, inputs)
        if batcher.admitted:
            raise RuntimeError(f"{batcher.admitted} texts were embedded without Ray")
    finally:
        embedder.close()
        await batcher.close()
        backbone.close()
    return times[-1] - begun, (times[-1] - times[0]) * len(inputs) / (len(inputs) - PART)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write benchmarks/results/ray_overhead.md and .json; 1 if the target is missed."""
    options = asked(__doc__, (), arguments)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    import ray

    report = Report("ray_overhead", "What Ray costs when it embeds an upload")
    inputs = texts(options.data or DEFAULT_FOLDER)
    alone, cold, warm = [], [], []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="topwork-bench-")))
        # An upload is given a half of the free CPUs: two of them.
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        stack.callback(ray.shutdown)
        config = Settings(store_url=str(folder), home=folder, engine="ray").worker
        processes = Bare(inputs, stack)
        stack.callback(processes.close)
        for _ in range(ROUNDS):
            alone.append(processes.seconds())
            both = asyncio.run(with_ray(config, inputs, folder))
            cold.append(both[0])
            warm.append(both[1])
            print(alone[-1], *both, file=sys.stderr, flush=True)
    ratios = Spread(tuple(ray / bare for ray, bare in zip(warm, alone, strict=True)))
    rows = [
        ["two bare processes", Spread(tuple(alone)).text(".1f", " s")],
        ["Ray, warm", Spread(tuple(warm)).text(".1f", " s")],
        ["Ray, with the start of its actors", Spread(tuple(cold)).text(".1f", " s")],
        ["warm, over bare", ratios.text(".3f")],
    ]
    report.add(f"{TEXTS:,} texts of {WORDS} words", table(["", "median (least-greatest)"], rows))
    report.data["seconds"] = {"bare": alone, "warm": warm, "cold": cold}
    report.expect("Ray, warm, over two bare processes", ratios.median, "<=", MOST)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
