"""`python -m benchmarks.gpu.service --results FOLDER`: what a service on a GPU gives over HTTP.

Texts of about 16 and 64 tokens and JPEGs of two sizes, one and 32 a request, from two processes with 64
connections; one request after the other; and the same from several replicas that share the GPU. Inputs come
from `--inputs`, a folder that the bundle brings, or are made here. `--device cpu` is a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.data.datasets import Sample, text_digest
from benchmarks.gpu.__main__ import texts
from benchmarks.harness.client import Client, Server
from benchmarks.harness.load import Load, Order, Round
from benchmarks.harness.payloads import TENANT, Scene, image_scene
from benchmarks.harness.report import RESULTS, Report, table
from benchmarks.harness.service_process import Serving

CONNECTIONS = 64
REPLICAS = (1, 2, 4)
SIZES = ((224, 224), (640, 480))
TOKENS = (16, 64)
FORMS = ("raw", "32 in JSON")
_LOADS = 2
_SAMPLES = 64
# Limits high enough that no request is refused: the throughput is measured, not the admission control.
_PATIENT = {
    "TOPWORK_MAX_WAIT": "60",
    "TOPWORK_MAX_QUEUE": "65536",
    "TOPWORK_MAX_BODIES_BYTES": str(8 << 30),
}
_GPU_SECONDS = re.compile(r'^topwork_gpu_seconds_total\{backbone="([^"]+)",stage="([^"]+)"\} (\S+)$', re.M)


def scenes(inputs: Path | None) -> list[Scene]:
    """The requests, texts first. inputs: a folder WxH/label.number.jpg of pictures; None makes them."""
    found = []
    for tokens in TOKENS:
        samples = [
            Sample(text, text.split()[0], str(place), "", text_digest(text))
            for place, text in enumerate(texts(2 * _SAMPLES, tokens))
        ]
        name = f"texts of {tokens} tokens"
        found.append(Scene(name, "text", "minilm-l6-v2", samples[:_SAMPLES], samples[-_SAMPLES:]))
    for width, height in SIZES:
        if inputs is None:
            scene = image_scene((width, height), Path(os.environ.get("TOPWORK_DATA", ".data")))
        else:
            files = sorted((inputs / f"{width}x{height}").glob("*.jpg"))
            samples = [
                Sample(file.read_bytes(), file.name.split(".")[0], file.name, "", file.name) for file in files
            ]
            name = f"JPEGs of {width}x{height}"
            scene = Scene(name, "image", "efficientnet-lite0", samples, samples[:_SAMPLES])
        found.append(scene)
    return found


class Figures:
    """A file of figures, one line of JSON each, written at once."""

    def __init__(self, results: Path | None) -> None:
        self._file = None if results is None else (results / "http.jsonl").open("a", encoding="utf-8")

    def note(self, **figures: Any) -> None:
        """One line."""
        line = json.dumps(figures)
        print(line, flush=True)
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()


@contextmanager
def replicas(count: int, device: str, homes: Path) -> Iterator[list[Serving]]:
    """Services, each with its home and its share of the cores. The first measures the plans."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // count)
    with ExitStack() as stack:
        found = []
        try:
            for number in range(count):
                begin = number * each % len(cores)
                # A process begins on the cores of the one that starts it.
                os.sched_setaffinity(0, cores[begin : begin + each])
                home = homes / f"{count}-{number}"
                environment = {"TOPWORK_DEVICE": device, **_PATIENT}
                found.append(stack.enter_context(Serving(home, environment=environment)))
        finally:
            os.sched_setaffinity(0, cores)
        yield found


@dataclass(frozen=True, slots=True)
class Seen:
    """Work of services: seconds of cores, and of their GPU threads by backbone and stage."""

    cpu: float
    gpu: dict[tuple[str, str], float]


def seen(services: Sequence[Serving]) -> Seen:
    """The work of all services since they started."""
    cpu, gpu = 0.0, dict[tuple[str, str], float]()
    for service in services:
        fields = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()
        cpu += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        with urllib.request.urlopen(f"{service.url}/metrics") as answer:
            for backbone, stage, seconds in _GPU_SECONDS.findall(answer.read().decode()):
                gpu[backbone, stage] = gpu.get((backbone, stage), 0.0) + float(seconds)
    return Seen(cpu, gpu)


def difference(before: Seen, after: Seen, backbone: str) -> dict[str, Any]:
    """The work between two readings, of one backbone."""
    stages = {
        stage: after.gpu[name, stage] - before.gpu.get((name, stage), 0.0)
        for name, stage in after.gpu
        if name == backbone
    }
    return {"cpu_seconds": after.cpu - before.cpu, "gpu_thread_seconds": stages}


def busy(
    scene: Scene, form: str, services: Sequence[Serving], seconds: float, connections: int, figures: Figures
) -> tuple[float, Round]:
    """Inputs a second of all services together, and all answers as one round."""
    requests = scene.forms()[form]
    count = max(_LOADS, len(services)) if connections > 1 else 1
    with ExitStack() as stack:
        loads = [stack.enter_context(Load(services[number % len(services)].url)) for number in range(count)]
        order = Order(requests, max(1, connections // count), seconds)
        before = seen(services)
        for load in loads:
            load.begin(order)
        rounds = [load.end() for load in loads]
        after = seen(services)
    whole = Round(max(one.seconds for one in rounds), sum(one.cpu_seconds for one in rounds))
    for one in rounds:
        whole.latencies += one.latencies
        whole.refused += one.refused
    inputs = len(scene.asked) / len(requests)
    rate = inputs * sum(one.rate for one in rounds)
    points = [1e3 * point for point in quantiles(whole.latencies, n=100)] if len(whole.latencies) > 1 else []
    figures.note(
        part="http",
        scene=scene.name,
        form=form,
        connections=connections,
        replicas=len(services),
        inputs_a_second=rate,
        p50_ms=points[49] if points else None,
        p99_ms=points[98] if points else None,
        refused=len(whole.refused),
        client_cpu_seconds=whole.cpu_seconds,
        seconds=whole.seconds,
        **difference(before, after, scene.backbone),
    )
    return rate, whole


def same_answers(home: Path, every: Sequence[Scene], on_device: dict[str, list[dict[str, Any]]]) -> list[Any]:
    """Asks the adapters of that home again, on the CPU.

    Of each scene: its name, how many inputs, how many other labels, and how far probabilities are apart.
    """
    rows = []
    with Serving(home, environment={"TOPWORK_DEVICE": "cpu"}) as service:
        client = Client(Server(service.url), TENANT)
        for scene in every:
            theirs, ours = on_device[scene.adapter], client.predict(scene.adapter, scene.asked, top_k=1)
            other = sum(one["label"] != two["label"] for one, two in zip(ours, theirs, strict=True))
            apart = max(
                abs(one["confidence"] - two["confidence"]) for one, two in zip(ours, theirs, strict=True)
            )
            rows.append((scene.name, len(ours), other, apart))
        client.close()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; 1 where a request was refused, or a label differs from the CPU's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.service", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--replicas", type=int, nargs="*", default=list(REPLICAS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    report = Report("gpu.service", "A service on a GPU, over HTTP")
    figures = Figures(options.results if options.device == "cuda" else None)
    every = scenes(options.inputs)
    rows = []
    with tempfile.TemporaryDirectory(prefix="topwork-gpu-") as scratch:
        for count in options.replicas:
            with replicas(count, options.device, Path(scratch)) as services:
                figures.note(part="start", replicas=count, seconds=[one.seconds_to_ready for one in services])
                answers: dict[str, list[dict[str, Any]]] = {}
                for service in services:
                    client = Client(Server(service.url), TENANT)
                    for scene in every:
                        client.adapt(scene.adapter, scene.taught, scene.backbone)
                        answers[scene.adapter] = client.predict(scene.adapter, scene.asked, top_k=1)
                    client.close()
                for scene in every:
                    plans = [(form, CONNECTIONS) for form in FORMS]
                    plans += [("raw", 1)] if count == 1 else []
                    for form, connections in plans:
                        rate, whole = busy(scene, form, services, options.seconds, connections, figures)
                        if options.device == "cuda":
                            report.expect(f"{scene.name}, {form}: refused", len(whole.refused), "<=", 0)
                        p50 = 1e3 * median(whole.latencies)
                        rows.append(
                            [str(count), scene.name, form, str(connections), f"{rate:.0f}", f"{p50:.1f}"]
                        )
                if options.device == "cuda":
                    _note_memory(figures, count)
            if count == 1:
                head = "same answers as on the CPU"
                for name, inputs, other, apart in same_answers(Path(scratch, "1-0"), every, answers):
                    figures.note(part=head, scene=name, inputs=inputs, other=other, largest_difference=apart)
                    report.expect(f"{name}: labels that differ from the CPU's", other, "<=", 0)
    report.add(
        "Inputs a second", table(["replicas", "", "form", "connections", "inputs a second", "p50, ms"], rows)
    )
    if options.device == "cpu":
        print("A rehearsal on the CPU, of which nothing is kept.")
        return int(not all(target.met for target in report.targets))
    return report.finish(options.results)


def _note_memory(figures: Figures, count: int) -> None:
    query = ["nvidia-smi", "--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return
    figures.note(part="memory", replicas=count, used=done.stdout.strip(), time=time.time())


if __name__ == "__main__":
    raise SystemExit(main())
